"""Runs the self tests that this machine can take, in other processes and with a time limit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

from fastbyol.doctor.finding import Finding
from fastbyol.doctor.packages import REBUILD_FFCV_ALONE, dali_package
from fastbyol.doctor.subprocesses import run_each

GROUP = "self tests"
LIMIT_S = 300.0
"""Longest wait for one test: seconds on a quiet machine, much more where caches of compiled code are empty and the cores busy."""
ALWAYS = ("folder backend", "JPEG check", "LARS and target", "LARS, foreach", "batch norm", "bf16 on the CPU")
NEEDS = {"ffcv backend": "ffcv", "dali backend": "dali", "torch.compile, CPU": "compiler", "target by apex": "apex"}
ON_GPU = (
    "views on the GPU",
    "LARS on the GPU",
    "target by triton",
    "target by apex",
    "bf16 on the GPU",
    "torch.compile, GPU",
    "NCCL",
    "dali on the GPU",
)
WAYS_OUT = {
    # Name the packages themselves: installing fastbyol[ffcv] would replace a checkout by the index's fastbyol, and reinstall torch.
    "ffcv backend": f"build it again: {REBUILD_FFCV_ALONE}, or train from tar shards or images",
    "dali backend": f"pip install --force-reinstall --no-deps {dali_package()}, or train from a .beton or images",
    "torch.compile, CPU": "not needed on a CPU; --precision.compile no trains without it",
    "torch.compile, GPU": "--precision.compile no trains without it, more slowly",
    "target by triton": "leave --optim.update at auto",
    "target by apex": "leave --optim.update at auto",
}


def chosen_tests(parts: set[str]) -> list[str]:
    """Returns the names of the tests that can run here. parts: those of ffcv, dali, apex, compiler and gpu that are present."""
    names = [*ALWAYS, *(name for name, needed in NEEDS.items() if needed in parts and name not in ON_GPU)]
    if "gpu" in parts:
        names += [name for name in ON_GPU if NEEDS.get(name, "gpu") in parts and ("dali" in parts or "dali" not in name)]
    return names


def self_test_findings(parts: set[str], *, announce: Callable[[str], None], limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """Yields the result of each self test."""
    names = chosen_tests(parts)
    announce(f"self tests: {', '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="fastbyol-doctor-", ignore_cleanup_errors=True) as folder:
        for name, result in run_each(names, "-W", "ignore", "-m", "fastbyol.doctor.trials", folder, limit_s=limit_s):
            yield finding_of(name, result)


def finding_of(name: str, result: dict[str, str]) -> Finding:
    """Returns the finding for a test's result."""
    if fault := result.get("fault"):
        return Finding(GROUP, name, "broken", fault, WAYS_OUT.get(name, "report it, with the output of python -m fastbyol doctor --json"))
    return Finding(GROUP, name, "ok", result["text"])
