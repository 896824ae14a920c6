"""The pages of the paper's tables, rebuilt from a handful of records whose figures are worked out by hand."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastbyol.config.errors import UserError
from fastbyol.config.presets import preset_config
from fastbyol.reproduction.page import DISCUSSION_FILE, write_tables
from fastbyol.reproduction.records import SETUP_FILE, Record, Setup, record_path, write_record, write_setup
from fastbyol.reproduction.tables import TABLES
from tests.commands import ROOT, files_no_larger_than

BASE = replace(preset_config("cpu_demo"), epochs=5.0)
SETUP = Setup("demo", "quick", 1, "demo/fashion", BASE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_setup(tmp_path, SETUP)
    return tmp_path


def add(folder: Path, run: str, *linear: float, status: str = "complete", **values: Any) -> None:
    """Writes a record with each of these linear accuracies, of seeds 0, 1, ...; kNN is ten points lower."""
    for seed, share in enumerate(linear):
        given = {
            "scores": {"linear": share, "knn": share - 0.1},
            "steps": 780,
            "num_train": 10_000,
            "num_val": 600,
            "cpu_s": 360.0,
            "device": "CPU",
        }
        write_record(folder, Record(run, seed, status, BASE, **(given | values)))


def markdown_rows(folder: Path, title: str) -> dict[str, list[str]]:
    """Returns the rows of one table of tables.md, header included, by their first cell."""
    section = (folder / "tables.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_each_figure_of_a_table_is_the_one_worked_out_by_hand(folder):
    add(
        folder,
        "byol",
        0.60,
        0.64,
        signs={"rankme": 12.34, "alignment": 0.5, "other_view_top1": 0.25},
        baselines={"untrained": {"linear": 0.4}},
    )
    add(folder, "tau_0.9", 0.58, 0.60)
    add(folder, "tau_1", 0.20, status="collapsed", why="every image gets the same projection")
    add(folder, "tau_0.999", 0.0, status="failed", why="no room | left", scores={}, cpu_s=0.0)
    write_tables(folder)
    rows = markdown_rows(folder, "Target decay rate")
    assert rows["tau_base"] == [
        *("here", "ours - base", "paper - base", "linear", "kNN", "seeds", "state", "paper's top-1"),
        *("RankMe", "alignment", "uniformity", "other view found", "CPU-minutes"),
    ]
    # Ours of tau 0.9: 0.58 - 0.60 and 0.60 - 0.64, the mean of -2 and -4 points. The paper's: 68.4 - 72.5.
    assert rows["0.9"] == ["0.9", "-3.0", "-4.1", "59.0 (58.0 to 60.0)", "49.0 (48.0 to 50.0)", "2", "", "68.4", "-", "-", "-", "-", "12.0"]
    assert rows["0.99"] == [
        *("0.8", "base", "base", "62.0 (60.0 to 64.0)", "52.0 (50.0 to 54.0)", "2", "", "72.5", "12.3", "0.500", "-", "25.0 %", "12.0")
    ]
    # Seed 0 alone: 0.20 - 0.60.
    assert rows["1, a constant random target"][:8] == ["1", "-40.0", "-53.7", "20.0", "10.0", "1", "collapsed", "18.8"]
    assert rows["0.999"] == ["0.999", "-", "-2.7", "-", "-", "-", "failed", "69.8", "-", "-", "-", "-", "-"]
    assert rows["0, the online network itself"][:8] == ["", "-", "-72.2", "-", "-", "-", "not run", "0.3"]
    text = (folder / "tables.md").read_text()
    # sqrt(0.62 * 0.38 / 600) is 1.98 points, times the root of two 2.80.
    spread = "one standard deviation of the base row's accuracy is 2.0 points, and that of a difference between two rows at most 2.8"
    assert f"with 600 val images, {spread}; the range" in text
    assert "Failed (no room \\| left): 0.999." in text
    assert "Not run yet: 0, the online network itself." in text
    # Five records of 360 s, and one of a run that failed before it took a step.
    assert "6 runs with 2 seeds; 1 collapsed, 1 failed; 30 CPU-minutes of training in all." in text
    assert "untrained encoder linear 40.0 %" in text
    assert "batch 64, 5 epochs of 10,000 images, 780 steps; at demo scale" in text


def test_simclr_is_compared_with_its_own_base_and_rows_without_meaning_at_this_scale_say_why(folder):
    add(folder, "byol", 0.70)
    add(folder, "simclr", 0.60, device="NVIDIA H100", wall_s=1800.0, ranks=4)
    add(folder, "simclr_batch_1024", 0.55)
    write_tables(folder)
    rows = markdown_rows(folder, "Batch size")
    assert rows["SimCLR, 1024"][:5] == ["16", "-5.0", "-0.5", "55.0", "45.0"]  # the paper's: 67.4 - 67.9
    assert rows["SimCLR, 4096"][:3] == ["64", "base", "base"]
    assert rows["BYOL, 64"][:3] == ["", "-", "-12.8"]
    text = (folder / "tables.md").read_text()
    assert "Not run at this scale, because batch norm would see 1 of the 64 images, in 1 process: BYOL, 64; SimCLR, 64." in text
    # Two of 360 processor seconds; half an hour of four GPUs.
    assert "12 CPU-minutes and 2.0 GPU-hours of training in all" in text
    assert "batch norm sees the same share of the batch as the paper's" in text
    assert "## Augmentations" not in text, "none of its own rows has been run"


def test_a_seed_that_the_base_lacks_is_left_out_of_the_difference(folder):
    add(folder, "byol", 0.60)
    add(folder, "projection_dim_512", 0.62, 0.80)
    write_tables(folder)
    assert markdown_rows(folder, "Dimensions of the projection")["512"][:5] == [
        "256",
        "+2.0",
        "+0.1",
        "71.0 (62.0 to 80.0)",
        "61.0 (52.0 to 70.0)",
    ]
    record_path(folder, "byol", 0).unlink()
    write_tables(folder)
    assert markdown_rows(folder, "Dimensions of the projection")["512"][1] == "-"
    assert "Noise" not in (folder / "tables.md").read_text()


def test_a_table_is_shown_though_all_its_rows_are_other_tables_too(folder):
    add(folder, "byol", 0.6)
    add(folder, "tau_0", 0.5)
    write_tables(folder)
    text = (folder / "tables.md").read_text()
    assert markdown_rows(folder, TABLES["tau"].title)
    assert f"## {TABLES['batch'].title}" not in text, "its base alone was run"
    add(folder, "tau_1", 0.5)
    write_tables(folder)
    assert f"## {TABLES['infonce'].title}" not in (folder / "tables.md").read_text(), "tau_1 is of one table"


def test_a_damaged_record_is_named_and_the_rest_of_its_table_is_there(folder, caplog):
    add(folder, "byol", 0.60, 0.62)
    add(folder, "depth_1_1", 0.50, 0.51)
    cut = record_path(folder, "depth_1_1", 1)
    cut.write_text(cut.read_text()[:100])
    add(folder, "depth_1_2", 0.5)
    damaged = record_path(folder, "depth_1_2", 0)
    damaged.write_text(damaged.read_text().replace('"num_val": 600', '"num_val": "many"'))
    write_tables(folder)
    assert [message.split(": ")[0] for message in caplog.messages] == [str(cut), str(damaged)]
    rows = markdown_rows(folder, "Depth of projector and predictor")
    assert rows["1, 1"][:5] == ["-10.0", "-10.6", "50.0", "40.0", "1"]
    assert rows["1, 2"][5] == "not run"
    for text in ((folder / "tables.md").read_text(), (folder / "tables.html").read_text()):
        for path in (cut, damaged):
            assert f"{path.name}: is not the record of a run, so it is left out of its row" in text


def test_the_page_has_hypothesis_discussion_plot_and_table_and_nothing_from_outside(folder):
    add(folder, "byol", 0.60, 0.62)
    add(folder, "simclr", 0.55, 0.57)
    for run, top1 in {"no_predictor_target_ema_beta_0": 0.2, "tau_0.9": 0.6, "batch_1024": 0.6, "simclr_batch_1024": 0.4}.items():
        add(folder, run, top1, top1 + 0.01)
    (folder / DISCUSSION_FILE).write_text("tau: >\n  The fast target <is>\n  best.\n")
    write_tables(folder)
    html = (folder / "tables.html").read_text()
    assert re.findall(r'<section id="(\w+)">', html) == ["overview", "batch", "tau", "infonce"]
    assert not re.search(r'(?:src|href)="(?!data:(?:image/png;base64)?,|#)|url\(|<script|@import|https?://', html)
    assert html.count("<img") == 3
    assert "<b>Found.</b> The fast target &lt;is&gt; best." in html
    assert html.count("<b>Found.</b>") == 1
    assert "There is a best value between the ends" in html
    assert "**Found.** The fast target \\<is> best." in (folder / "tables.md").read_text()


@pytest.mark.parametrize(
    ("discussion", "said"),
    [
        ("tau: [", "discussion.yaml: is left out ("),
        ("tau: 3", "it must hold a text under the name of each table"),
        ("tua: a text", "there is no table 'tua' (did you mean tau?)"),
    ],
)
def test_a_folder_without_records_and_a_discussion_that_is_none_are_said(discussion, said, folder):
    (folder / DISCUSSION_FILE).write_text(discussion)
    write_tables(folder)
    for name in ("tables.md", "tables.html"):
        assert "No run is finished yet." in (folder / name).read_text()
    assert said in (folder / "tables.md").read_text()


@pytest.mark.parametrize("kept", ["fashion", "scenes"])
def test_the_kept_pages_are_those_of_their_records(kept, tmp_path):
    source = ROOT / "docs" / "reproduction" / kept
    copy = shutil.copytree(source, tmp_path / kept, ignore=shutil.ignore_patterns("tables.*", "runs"))
    write_tables(copy)
    for name in ("tables.md", "tables.html"):
        # Another version of matplotlib draws other bytes.
        new, old = (re.sub(r"base64,[^\"]*", "base64,", (place / name).read_text()) for place in (copy, source))
        assert new == old, f"write it again from its records: {name}"


def test_a_folder_of_something_else_and_a_full_disk_are_one_line(folder):
    add(folder, "byol", 0.6)
    write_tables(folder)
    before = (folder / "tables.html").read_text()
    add(folder, "tau_0.9", 0.6)
    with (
        files_no_larger_than(1000),
        pytest.raises(UserError, match=r"tables.html: cannot be written \(File too large\); make room or move it away"),
    ):
        write_tables(folder)
    assert (folder / "tables.html").read_text() == before
    (folder / SETUP_FILE).unlink()
    with pytest.raises(UserError, match="setup.json: is not there, so the folder holds no tables"):
        write_tables(folder)
