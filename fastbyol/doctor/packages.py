"""Python packages: which are installed in which version, whether they import, and what each missing one costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastbyol.config.packages import CORE, OPTIONAL, Part
from fastbyol.doctor.finding import Finding
from fastbyol.doctor.subprocesses import run_each

GROUPS = "packages that every run needs", "optional packages"
IMPORT_LIMIT_S = 60.0
ANOTHER_NUMPY = re.compile(
    r"numpy\.core\.multiarray|_ARRAY_API|compiled (using|against)|numpy\.dtype size changed|numpy\.core\.umath", re.I
)
"""What Python says when a compiled package was built against another numpy than the one installed."""


REBUILD_FFCV_ALONE = "pip install --force-reinstall --no-cache-dir --no-deps ffcv==1.0.2"
REBUILD_FFCV = f"{REBUILD_FFCV_ALONE}; pip install --upgrade opencv-python numba"
FFCV_NEEDS = (
    "apt-get install g++ pkg-config libturbojpeg0-dev libopencv-dev, then pip install 'fastbyol[ffcv]' (in a checkout: make install)"
)


LIBRARY_PACKAGES = {
    "libGL.so": "libgl1",
    "libgthread-2.0.so": "libglib2.0-0",
    "libglib-2.0.so": "libglib2.0-0",
    "libturbojpeg.so": "libturbojpeg0",
}
"""Debian's package of a system library that Python packages here load and a server may lack."""


def package_findings(*, imports: bool) -> Iterator[Finding]:
    """Yields what there is to say about each package. imports: also import each installed one, in another process."""
    parts = [*CORE, *_with_installed_dali(OPTIONAL)]
    installed = {part.package: found for part in parts if (found := version_of(part.package))}
    faults = import_faults([part.module for part in parts if part.package in installed]) if imports else {}
    for group, members in zip(GROUPS, (CORE, _with_installed_dali(OPTIONAL)), strict=True):
        for part in members:
            yield _finding(part, group, installed.get(part.package, ""), faults.get(part.module, ""))
    yield from apex_finding(GROUPS[1])


def _finding(part: Part, group: str, version: str, fault: str) -> Finding:
    if not version:
        way_out = FFCV_NEEDS if part.package == "ffcv" else part.command
        return Finding(group, part.package, "broken" if part in CORE else "missing", f"not installed: {part.without}", way_out)
    if fault and ANOTHER_NUMPY.search(fault):
        built = f"built against another numpy than the {version_of('numpy')} installed here ({fault})"
        if part.package == "ffcv":
            # Only its C library is loaded, which does not depend on numpy; a self test of its own checks it.
            text = f"{version}, its Python package does not import: it, or one that it needs, was {built}; training uses its C library only"
            return Finding(group, part.package, "broken", text, REBUILD_FFCV)
        built = f"{version}, {built}"
        return Finding(group, part.package, "broken", built, f"pip install --force-reinstall --no-cache-dir {part.package}")
    if fault:
        way_out = f"pip install --force-reinstall {part.package}"
        if lacking := next((package for library, package in LIBRARY_PACKAGES.items() if library in fault), ""):
            # Installing it again would change nothing.
            way_out = f"apt-get install {lacking}"
            if part.package == "ffcv":
                fault += "; training uses its C library only"
        return Finding(group, part.package, "broken", f"{version}, does not import: {fault}", way_out)
    if complaint := too_old(part.package, version):
        return Finding(
            group, part.package, "broken", f"{version}: {complaint}", f"pip install --upgrade '{complaint.removeprefix('needs ')}'"
        )
    return Finding(group, part.package, "ok", version)


def _with_installed_dali(parts: Sequence[Part]) -> list[Part]:
    """Returns the parts with the build of DALI that is installed, for CUDA 12 or 13."""
    dali12 = version_of("nvidia-dali-cuda120")
    return [
        Part("nvidia-dali-cuda120", part.module, "dali-cu12", part.without) if dali12 and part.extra == "dali" else part for part in parts
    ]


def dali_package() -> str:
    """Returns the name of DALI's package that is installed, or of the one that our extra asks for."""
    return _with_installed_dali([part for part in OPTIONAL if part.extra == "dali"])[0].package


def version_of(package: str) -> str:
    """Returns the installed version of a package, '' if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def too_old(package: str, version: str) -> str:
    """Returns 'needs package>=x' if the installed fastbyol asks for another version of this package, else ''."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # it has a finding of its own
        return ""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("fastbyol") or []]
    except (importlib.metadata.PackageNotFoundError, InvalidRequirement):  # a checkout that is not installed
        return ""
    for requirement in wanted:
        same = requirement.name.lower().replace("_", "-") == package
        if same and not requirement.specifier.contains(version, prereleases=True):
            return f"needs {requirement.name}{requirement.specifier}"
    return ""


_IMPORT = """
import importlib, sys
from fastbyol.config.errors import shortened
from fastbyol.doctor.subprocesses import report
for name in sys.argv[1:]:
    report(begun=name)
    try:
        importlib.import_module(name)
        report(fault="")
    except BaseException as error:
        report(fault=f"{type(error).__name__}: {shortened(error)}")
"""


def import_faults(modules: Sequence[str]) -> dict[str, str]:
    """Imports the modules one after another, and returns the reason for each that cannot be."""
    results = run_each(modules, "-W", "ignore", "-c", _IMPORT, limit_s=IMPORT_LIMIT_S)
    return {name: result["fault"] for name, result in results if result["fault"]}


def apex_finding(group: str) -> Iterator[Finding]:
    """Yields a finding if a package named apex is installed: NVIDIA's, or PyPI's web toolkit of the same name."""
    version = version_of("apex")
    if not version:
        return  # nothing here needs it
    if importlib.util.find_spec("amp_C") is not None:
        yield Finding(group, "apex", "ok", f"{version}, NVIDIA's, with its CUDA extensions: --optim.update apex can use them on a GPU")
        return
    # Looked for as a folder: importing the wrong one would import a web framework.
    spec = importlib.util.find_spec("apex")
    ours = any(Path(folder, "optimizers").is_dir() for folder in (spec.submodule_search_locations if spec else None) or [])
    way_out = "pip uninstall apex; fastbyol needs none: --optim.update auto has kernels of its own"
    if ours:
        text = f"{version}, NVIDIA's, but built without its CUDA extensions (no module amp_C): --optim.update apex cannot use it"
    else:
        text = f"{version} is the wrong apex: PyPI's package of that name is a web toolkit, NVIDIA's is at github.com/NVIDIA/apex only"
    yield Finding(group, "apex", "broken", text, way_out)
