"""The machine: Python, cores, memory and limits as a container sees them, compiler, GPUs and what torch was built for."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastbyol import __version__
from fastbyol.doctor.finding import Finding
from fastbyol.doctor.subprocesses import run_python
from fastbyol.host.quantities import bytes_text

MACHINE, GPU = "this machine", "GPU"
LOW_MEMORY, LOW_SHM, LOW_FILES = 8 << 30, 1 << 30, 4096
GPU_LIMIT_S = 90.0
CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
DEVICES = Path("/dev")
VISIBLE = "CUDA_VISIBLE_DEVICES"


def machine_findings() -> Iterator[Finding]:
    """Yields the findings that need no torch."""
    yield Finding(MACHINE, "fastbyol", "ok", f"{__version__} in {Path(__file__).parents[1]}")
    yield Finding(MACHINE, "Python", "ok", f"{platform.python_version()}, {platform.platform()}")
    yield _cores()
    yield _memory()
    yield _shared_memory()
    yield _open_files()
    yield _compiler()


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    quotas = [limit for group in cgroup_folders() if (limit := _core_limit(group)) is not None]
    if (allowed := min(quotas, default=cores)) < cores:
        way_out = f"start fewer workers: --data.workers {max(1, int(allowed))}, OMP_NUM_THREADS={max(1, int(allowed))}, or raise the container's limit"
        return Finding(MACHINE, "cores", "low", f"{cores}, of which the container may use {allowed:g}", way_out)
    return Finding(MACHINE, "cores", "ok", f"{cores}")


def _memory() -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = min([total, *(limit for group in cgroup_folders() if (limit := _memory_limit(group)) is not None)])
    text = f"{bytes_text(allowed)}" + (f", the container's limit, of {bytes_text(total)}" if allowed < total else "")
    if allowed < LOW_MEMORY:
        return Finding(
            MACHINE,
            "memory",
            "low",
            f"{text}: a ResNet-50 needs more",
            "raise the container's limit, or take a smaller encoder and --rank_batch",
        )
    return Finding(MACHINE, "memory", "ok", text)


def cgroup_folders() -> list[Path]:
    """Returns the folders of this process's control groups and of all groups above them: a limit on any of them applies, and SLURM sets it four levels up."""
    try:
        mine = OWN_GROUPS.read_text()
    except OSError:
        return []
    folders = []
    for line in mine.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        group = Path(path.lstrip("/"))
        # cgroup v1 has a hierarchy for each controller, v2 one for all. The last of the parents is the root: inside a container, its own group.
        roots = [CGROUPS / controller for controller in controllers.split(",") if controller]
        folders += [root / parent for root in roots or [CGROUPS] for parent in (group, *group.parents)]
    return list(dict.fromkeys(folders))


def _memory_limit(group: Path) -> int | None:
    """Returns the bytes that a control group may use, None without a limit. cgroup v1 says 'no limit' as a number near 2**63, which is more than any memory."""
    value = _value(group / "memory.max") or _value(group / "memory.limit_in_bytes")
    return int(value) if value.isdecimal() else None


def _core_limit(group: Path) -> float | None:
    """Returns the cores that a control group may use, as processor time over elapsed time; None without a limit."""
    quota, period = [*_value(group / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota, period = _value(group / "cpu.cfs_quota_us"), _value(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _value(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding(MACHINE, "/dev/shm", "low", "is not there: several GPUs exchange gradients more slowly", "mount a tmpfs at /dev/shm")
    if size < LOW_SHM:
        text = f"{bytes_text(size)}: NCCL may fail with several GPUs; loading data does not use it"
        return Finding(MACHINE, "/dev/shm", "low", text, "docker run --ipc=host, or --shm-size 8g")
    return Finding(MACHINE, "/dev/shm", "ok", bytes_text(size))


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Tar shards are all kept open, some 570 for ImageNet, and the soft limit is raised as far as the hard one allows.
    if hard != resource.RLIM_INFINITY and hard < LOW_FILES:
        text = f"{soft}, at most {hard}: may be too few for large data sets of tar shards, which are all kept open"
        return Finding(MACHINE, "open files", "low", text, "ulimit -Hn 65536 as root, docker run --ulimit nofile=65536, or larger shards")
    return Finding(MACHINE, "open files", "ok", f"{soft}, at most {'unlimited' if hard == resource.RLIM_INFINITY else hard}")


def _compiler() -> Finding:
    # Inductor takes the compiler that CXX names, else the first of these.
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if found := next(filter(None, map(shutil.which, names)), None):
        return Finding(MACHINE, "C++ compiler", "ok", found)
    text = "torch.compile does not work on a CPU, and ffcv cannot be built; training works without both"
    return Finding(MACHINE, "C++ compiler", "missing", text, "apt-get install g++")


_FACTS = """
import warnings
from fastbyol.doctor.subprocesses import report
import torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "built_for": torch.cuda.get_arch_list() if torch.version.cuda else []}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    facts["usable"] = torch.cuda.is_available()
facts["why_not"] = "; ".join(" ".join(str(warning.message).split()) for warning in said)
if facts["usable"]:
    facts["gpus"] = [
        {"name": found.name, "capability": f"{found.major}{found.minor}", "bytes": found.total_memory}
        for found in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
report(**facts)
from fastbyol.run.precision import is_bf16_fast
report(bf16=is_bf16_fast(torch.device("cpu")))
"""


def gpu_findings() -> Iterator[Finding]:
    """Yields findings on the GPUs that torch sees. Torch runs in another process, so that a driver that hangs does not hang this one."""
    ended = run_python("-c", _FACTS, limit_s=GPU_LIMIT_S)
    facts: dict[str, Any] = {name: value for report in ended.reports for name, value in report.items()}
    if "torch" not in facts:
        yield Finding(GPU, "torch", "broken", f"cannot be asked: {ended.fault}", "pip install --force-reinstall torch torchvision")
        return
    driver = driver_version()
    build = f"for CUDA {facts['cuda']}" if facts["cuda"] else "for the CPU"
    if not facts["usable"]:
        if driver and (withheld := _withheld()):
            text = f"none for this process: driver {driver} is here, but {withheld[0]}; training uses the CPU"
            yield Finding(GPU, "GPU", "missing", text, withheld[1])
        elif driver and not facts["cuda"]:
            text = f"driver {driver} is here, but torch {facts['torch']} was built {build} and trains on that"
            yield Finding(GPU, "GPU", "low", text, "install a CUDA build of torch (pytorch.org/get-started)")
        elif driver:
            why = facts["why_not"] or ended.fault or f"torch {facts['torch']} was built {build}"
            way_out = "install a torch that this driver can run (pytorch.org/get-started), or a newer driver"
            yield Finding(GPU, "GPU", "broken", f"driver {driver} is here, but torch cannot use it: {why}", way_out)
        else:
            yield Finding(
                GPU, "GPU", "missing", f"none: small images and the demo train on a CPU, ImageNet does not (torch {facts['torch']} {build})"
            )
    for number, gpu in enumerate(facts.get("gpus", [])):
        yield gpu_finding(number, gpu, facts["built_for"])
    if facts["usable"]:
        yield Finding(GPU, "driver", "ok", f"{driver or 'of unknown version'}; torch {facts['torch']} {build}")
        if facts["nccl"]:
            yield Finding(GPU, "NCCL", "ok", facts["nccl"])
        else:
            yield Finding(
                GPU,
                "NCCL",
                "missing",
                "this torch was built without it: several GPUs cannot train together",
                "install a CUDA build of torch",
            )
        yield _nvjpeg()
    if facts.get("bf16"):
        yield Finding(MACHINE, "bf16 on this CPU", "ok", "oneDNN has bf16 kernels for this CPU")
    else:
        yield Finding(
            MACHINE, "bf16 on this CPU", "low", "this CPU has no bf16 instructions: a run on it computes in float32, which is faster"
        )


def _withheld() -> tuple[str, str] | None:
    """Returns why no GPU of this machine was given to this process, and the way out; None if one was.

    The driver's version does not show it: a container without GPUs sees the host's driver too.
    """
    if os.environ.get(VISIBLE) in ("", "-1", "NoDevFiles"):
        return f"{VISIBLE} is {os.environ[VISIBLE]!r}", f"unset {VISIBLE}, or ask the scheduler for a GPU"
    if not any(DEVICES.glob("nvidia[0-9]*")) and not (DEVICES / "dxg").exists():  # dxg: Windows' WSL
        return f"no GPU is visible: {DEVICES}/nvidia0 is not there", "docker run --gpus all, or ask the scheduler for a GPU"
    return None


def gpu_finding(number: int, gpu: dict[str, Any], built_for: list[str]) -> Finding:
    """Returns a finding on whether this build of torch has code for the GPU: for its generation, or PTX that the driver compiles for it."""
    capability = int(gpu["capability"])
    text = f"{gpu['name']}, {bytes_text(gpu['bytes'])}, compute capability {capability // 10}.{capability % 10}"
    codes = [(kind, int(code)) for kind, code in re.findall(r"(sm|compute)_(\d+)", " ".join(built_for))]
    # Code of a lower minor version runs on a higher one of the same major version; PTX runs on everything newer.
    fits = any(code <= capability and (kind == "compute" or code // 10 == capability // 10) for kind, code in codes)
    if fits:
        return Finding(GPU, f"GPU {number}", "ok", text)
    way_out = "install a torch built for this GPU (pytorch.org/get-started)"
    return Finding(GPU, f"GPU {number}", "broken", f"{text}: torch was built for {', '.join(built_for)} only", way_out)


def _nvjpeg() -> Finding:
    from fastbyol.doctor.packages import version_of

    for package in ("nvidia-nvjpeg", "nvidia-nvjpeg-cu12"):
        if version := version_of(package):
            return Finding(GPU, "nvJPEG", "ok", f"{version} (DALI decodes with it)")
    text = "not installed: DALI uses the one of the CUDA toolkit, or decodes on the CPU"
    return Finding(GPU, "nvJPEG", "missing", text, "pip install 'fastbyol[dali]'")


def driver_version() -> str:
    """Returns the version of NVIDIA's kernel driver, '' where none is loaded."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else "of unknown version"
