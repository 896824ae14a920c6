"""scripts/distribution_check.py finds what is missing from, or too much in, an sdist and a wheel; release.sh's conditions for a release."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.commands import ROOT, SCRIPTS

specification = importlib.util.spec_from_file_location("distribution_check", SCRIPTS / "distribution_check.py")
assert specification is not None
assert specification.loader is not None
check = importlib.util.module_from_spec(specification)
specification.loader.exec_module(check)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"fastbyol-{PROJECT['version']}"
ABOUT = f"{NAME}.dist-info"
PACKAGE = sorted(
    path.relative_to(ROOT).as_posix() for pattern in ("*.py", "*.typed") for path in (ROOT / "fastbyol").rglob(pattern) if path.is_file()
)
METADATA = "\n".join(
    [
        "Metadata-Version: 2.4",
        "Name: fastbyol",
        f"Requires-Python: {PROJECT['requires-python']}",
        "Description-Content-Type: text/markdown",
        *(f"Provides-Extra: {extra}" for extra in PROJECT["optional-dependencies"]),
        "",
        "# fastbyol",
    ]
)
WHEEL = {
    **dict.fromkeys(PACKAGE, ""),
    f"{ABOUT}/METADATA": METADATA,
    f"{ABOUT}/entry_points.txt": "[console_scripts]\nfastbyol = fastbyol.__main__:main\n",
    f"{ABOUT}/licenses/LICENSE": "Apache",
    f"{ABOUT}/RECORD": "",
}
SDIST = {
    **dict.fromkeys(PACKAGE, ""),
    **dict.fromkeys(
        ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "PKG-INFO"), ""
    ),
}


def write(folder: Path, wheel: dict[str, str], sdist: dict[str, str]) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{NAME}-py3-none-any.whl", "w") as archive:
        for name, text in wheel.items():
            archive.writestr(name, text)
    with tarfile.open(folder / f"{NAME}.tar.gz", "w:gz") as archive:
        for name, text in sdist.items():
            member = tarfile.TarInfo(f"{NAME}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return folder


def without(files: dict[str, str], name: str) -> dict[str, str]:
    assert name in files
    return {each: text for each, text in files.items() if each != name}


def test_a_whole_sdist_and_wheel_pass(tmp_path, capsys):
    assert check.main(write(tmp_path / "dist", WHEEL, SDIST)) == 0
    assert "all of the package is there, and nothing else" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wheel", "sdist", "fault"),
    [
        (without(WHEEL, "fastbyol/commands/convert.py"), SDIST, ".whl: lacks fastbyol/commands/convert.py"),
        (without(WHEEL, "fastbyol/py.typed"), SDIST, ".whl: lacks fastbyol/py.typed"),
        (WHEEL | {"tests/test_byol.py": ""}, SDIST, ".whl: holds tests/test_byol.py"),
        (without(WHEEL, f"{ABOUT}/licenses/LICENSE"), SDIST, ".whl: lacks the licence"),
        (WHEEL | {f"{ABOUT}/entry_points.txt": "[console_scripts]\n"}, SDIST, ".whl: brings no command fastbyol"),
        (
            WHEEL | {f"{ABOUT}/METADATA": METADATA.replace("Provides-Extra: timm\n", "")},
            SDIST,
            ".whl: its extras differ from pyproject.toml: timm",
        ),
        (
            WHEEL | {f"{ABOUT}/METADATA": METADATA.replace(PROJECT["requires-python"], ">=3.8")},
            SDIST,
            ".whl: Requires-Python is >=3.8",
        ),
        (WHEEL | {f"{ABOUT}/METADATA": METADATA.replace("text/markdown", "text/plain")}, SDIST, ".whl: has no description"),
        (without(WHEEL, f"{ABOUT}/METADATA") | {"fastbyol-9.dist-info/METADATA": METADATA}, SDIST, ".whl: is not of version"),
        (WHEEL, without(SDIST, "SECURITY.md"), ".tar.gz: lacks SECURITY.md"),
        (WHEEL, without(SDIST, "fastbyol/train.py"), ".tar.gz: lacks fastbyol/train.py"),
        (WHEEL, SDIST | {"benchmarks/run.py": ""}, ".tar.gz: holds benchmarks/run.py"),
    ],
)
def test_each_fault_is_named_alone(wheel, sdist, fault, tmp_path, capsys):
    assert check.main(write(tmp_path / "dist", wheel, sdist)) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert fault in line


def test_a_wheel_too_large_and_a_second_one_are_faults(tmp_path, capsys):
    folder = write(tmp_path / "dist", WHEEL | {"fastbyol/__init__.py": "x" * ((2 << 20) + 1)}, SDIST)
    assert check.main(folder) == 1
    assert "bytes, more than 2,097,152" in capsys.readouterr().out
    (folder / "fastbyol-0.0.1-py3-none-any.whl").write_bytes(b"")
    assert check.main(folder) == 1
    assert "holds 2 wheels and 1 sdists, must hold one of each" in capsys.readouterr().out


def release(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(folder / "scripts" / "release.sh"), *options]
    return subprocess.run(command, env=os.environ | {"PYTHON": f"{folder}/python"}, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of an unreleased version, with a Python that has build and twine; building itself fails at once."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/release.sh", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n- something\n")
    script = (
        f'#!/bin/sh\ncase "$*" in *"import build"*) exit 0;; *"-m build"*) echo no build here; exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").write_text(script)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def test_a_release_wants_its_version_in_the_changelog_and_a_clean_tagged_commit(checkout):
    done = release(checkout)
    assert (done.returncode, "CHANGELOG.md begins with '## Unreleased'" in done.stderr) == (2, True), done.stderr
    (checkout / "CHANGELOG.md").write_text(f"# Changelog\n\n## {PROJECT['version']} - 2030-01-31\n- something\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert "the checkout has uncommitted changes" in release(checkout).stderr
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "a"], check=True)
    assert f"this commit is not tagged v{PROJECT['version']}" in release(checkout).stderr
    subprocess.run([*git, "tag", f"v{PROJECT['version']}"], check=True)
    assert "python -m build failed" in release(checkout).stderr, "it begins to build"


def test_a_dry_run_builds_whatever_changelog_and_git_say_and_other_options_are_refused(checkout):
    assert "python -m build failed" in release(checkout, "--dry_run").stderr
    assert "--dry-run: no such option; --dry_run is the only one" in release(checkout, "--dry-run").stderr
