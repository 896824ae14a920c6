"""Checks what an sdist and a wheel hold: all of the package and its metadata, and nothing of the tests or benchmarks.

python scripts/distribution_check.py dist        (exit code 1: something is wrong, a line each)
"""

from __future__ import annotations

import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED_TO_BUILD = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff", "SECURITY.md")
LARGEST_BYTES = 2 << 20


def package_files() -> set[str]:
    """Returns the files of the package in this checkout."""
    found = (path.relative_to(ROOT).as_posix() for path in (ROOT / "fastbyol").rglob("*") if path.suffix in (".py", ".typed"))
    return {name for name in found if "__pycache__" not in name}


def wheel_faults(path: Path) -> Iterator[str]:
    """Yields what is wrong with a wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        about = f"fastbyol-{project['version']}.dist-info"
        if f"{about}/METADATA" not in names:
            yield f"{path.name}: is not of version {project['version']}"
            return
        metadata = HeaderParser().parsestr(wheel.read(f"{about}/METADATA").decode())
        programs = wheel.read(f"{about}/entry_points.txt").decode()
    for name in sorted(package_files() - names):
        yield f"{path.name}: lacks {name}"
    for name in sorted(name for name in names - package_files() if not name.startswith(about)):
        yield f"{path.name}: holds {name}"
    if f"{about}/licenses/LICENSE" not in names:
        yield f"{path.name}: lacks the licence"
    if "fastbyol = fastbyol.__main__:main" not in programs:
        yield f"{path.name}: brings no command fastbyol"
    extras = set(metadata.get_all("Provides-Extra") or [])
    if extras != set(project["optional-dependencies"]):
        yield f"{path.name}: its extras differ from pyproject.toml: {', '.join(sorted(extras ^ set(project['optional-dependencies'])))}"
    if metadata["Requires-Python"] != project["requires-python"]:
        yield f"{path.name}: Requires-Python is {metadata['Requires-Python']}"
    if metadata["Description-Content-Type"] != "text/markdown" or not metadata.get_payload():
        yield f"{path.name}: has no description"
    if path.stat().st_size > LARGEST_BYTES:
        yield f"{path.name}: {path.stat().st_size:,} bytes, more than {LARGEST_BYTES:,}"


def sdist_faults(path: Path) -> Iterator[str]:
    """Yields what is wrong with an sdist. That a wheel can be built from it, `python -m build` has shown: it does just that."""
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in sorted({*package_files(), *NEEDED_TO_BUILD} - names):
        yield f"{path.name}: lacks {name}"
    for name in sorted(name for name in names if name.partition("/")[0] in ("tests", "benchmarks", "data_prep", "docs", "runs")):
        yield f"{path.name}: holds {name}"


def main(folder: Path) -> int:
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        print(f"{folder}: holds {len(wheels)} wheels and {len(sdists)} sdists, must hold one of each")
        return 1
    faults = [*wheel_faults(wheels[0]), *sdist_faults(sdists[0])]
    print("\n".join(faults) if faults else f"{wheels[0].name}, {sdists[0].name}: all of the package is there, and nothing else")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
