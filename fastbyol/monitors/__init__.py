"""Monitoring of a run: means over each logging interval, speed and where the time goes, norms, memory, signs of collapse."""

from fastbyol.monitors.monitor import Monitor, build_monitor

__all__ = ["Monitor", "build_monitor"]
