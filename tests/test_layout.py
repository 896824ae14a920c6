"""Rules of the repository's layout."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_no_file_beside_an_entry_point_shadows_another_module():
    """`torchrun fastbyol/train.py` puts fastbyol/ first on sys.path: a random.py there would be imported by torch itself."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    for folder in ("fastbyol", "data_prep"):
        names = {p.stem for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
        names -= {"__init__", "__main__"}
        assert names, folder
        assert not names & taken, folder


def test_no_file_is_named_for_having_no_concept():
    assert not [p for p in ROOT.glob("**/*.py") if re.fullmatch(r"(utils?|helpers?|common|misc)", p.stem) and ".venv" not in p.parts]


def test_importing_the_package_needs_no_optional_backend():
    import subprocess

    code = (
        "import sys, fastbyol, fastbyol.config.presets, fastbyol.data;"
        "sys.exit(bool({'ffcv', 'nvidia.dali', 'apex', 'torch_optimizer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_runs_from_this_checkout_and_not_from_an_old_copy():
    import fastbyol

    assert Path(fastbyol.__file__).parent == ROOT / "fastbyol"


def test_the_contributing_page_lists_the_layers_that_the_linter_checks():
    from tests.layer_list import layer_list, with_layers

    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert page == with_layers(page)
    assert "`ranks`" in layer_list()
