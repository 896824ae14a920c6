"""The configuration of a run: frozen dataclasses that are checked when they are built. Standard library only."""
