"""Rules of the repository's layout."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, run_python


def test_no_file_beside_an_entry_point_shadows_another_module():
    """`torchrun fastbyol/train.py` puts fastbyol/ first on sys.path: a random.py there would be imported by torch itself."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    for folder in ("fastbyol", "data_prep"):
        names = {p.stem for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
        names -= {"__init__", "__main__"}
        assert names, folder
        assert not names & taken, folder


def test_no_file_is_named_for_having_no_concept():
    assert not [
        p for p in ROOT.glob("**/*.py") if re.fullmatch(r"(utils?|helpers?|common|misc)", p.stem) and "site-packages" not in p.parts
    ]


@pytest.mark.parametrize(
    ("imported", "not_needed"),
    [
        ("fastbyol, fastbyol.config.presets, fastbyol.data", ("ffcv", "nvidia.dali", "apex", "torch_optimizer")),
        ("fastbyol.data, fastbyol.data.conversion.encode", ("ffcv", "nvidia.dali", "torch", "numba")),
        ("fastbyol.data.inputs.listing", ("torch", "PIL", "tarfile")),  # each worker of a conversion imports it
    ],
)
def test_importing_a_module_does_not_import_what_only_others_need(imported, not_needed):
    done = run_python("-c", f"import sys, {imported}; print([name for name in {not_needed} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_the_package_runs_from_this_checkout_and_not_from_an_old_copy():
    import fastbyol

    assert Path(fastbyol.__file__).parent == ROOT / "fastbyol"


def test_the_contributing_page_lists_the_layers_that_the_linter_checks():
    from tests.layer_list import layer_list, with_layers

    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert page == with_layers(page)
    assert "`ranks`" in layer_list()
