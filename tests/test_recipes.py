"""docs/recipes.md against what it is about: the presets, and the kept records of the runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from benchmarks.recipes import differences, main, table
from benchmarks.small_sets import DEMO_SETS, SETS, draw_letter, on_white, random_piece, split_of
from fastbyol.config.presets import preset_config
from tests.commands import ROOT

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECORDS = json.loads((ROOT / "docs" / "recipes.json").read_text(encoding="utf-8"))


def test_the_table_of_the_page_is_that_of_the_kept_records():
    of = {name: [record for record in RECORDS if record["table"] == name] for name in ("recipes", "demo", "leads", "tried first")}
    assert sum(map(len, of.values())) == len(RECORDS)
    assert all("\n".join(table(records)) in PAGE for records in of.values())
    assert "\n".join(differences(of["leads"], base="base")) in PAGE
    assert {record["set"] for record in of["recipes"]} == set(SETS)
    assert {record["set"] for record in of["demo"]} == set(DEMO_SETS)
    assert all(record["scores"]["byol"]["linear"] <= 100 for record in RECORDS)


@pytest.mark.parametrize("name", ["own_tiny", "own_small", "own", "own_large"])
def test_the_table_of_presets_has_their_numbers(name):
    config = preset_config(name)
    length = f"{config.steps:,} steps" if config.steps else f"{config.epochs:g} epochs"
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    assert f"| {config.global_batch} | {length} | {config.optim.base_lr:g}, {config.optim.tau_base:g} |" in row
    assert f"{config.model.encoder.replace('resnet', 'ResNet-')}, {config.views.size_px} px" in row


def test_a_row_has_the_mean_and_the_extremes_over_the_seeds():
    runs = [
        {"set": "a", "recipe": "r", "seed": seed, "steps": 10, "cpu_s": 60, "scores": {"byol": {"linear": 50.0 + 2 * seed, "knn": 40.0}}}
        for seed in (0, 1)
    ]
    assert table(runs)[2] == "| a | r | 2 | 10 | 1.0 | 51.0 (50.0 to 52.0) / 40.0 | - | - | - |"
    assert re.fullmatch(r"(\|---)+\|", table(runs)[1])


def test_a_difference_is_settled_beyond_two_standard_errors_of_the_same_seeds():
    def run(recipe: str, seed: int, linear: float, knn: float, **more: dict[str, float]) -> dict[str, Any]:
        return {"set": "a", "recipe": recipe, "seed": seed, "scores": {"byol": {"linear": linear, "knn": knn}, **more}}

    whole = {"byol_whole": {"linear": 49.0, "knn": 41.0}}
    records = [run("base", seed, 50.0 + 10 * seed, 40.0, **(whole if seed < 2 else {})) for seed in range(4)]
    # Linear +1, +2, +3: mean 2, standard deviation 1, error 1/sqrt(3). kNN -1, 0, +1: mean 0. Seed 7 has no base.
    records += [run("other", seed, 51.0 + 11 * seed, 39.0 + seed) for seed in (0, 1, 2)] + [run("other", 7, 0.0, 0.0), run("once", 0, 1, 1)]
    lines = differences(records, base="base")
    assert lines[2:] == [
        "| a | other | 3 | +2.0 ± 0.6, better | +0.0 ± 0.6, not settled |",
        "| a | whole image at evaluation | 2 | -6.0 ± 5.0, not settled | +1.0 ± 0.0, better |",
    ]


def test_kept_records_replace_those_of_their_table_alone(tmp_path, capsys):
    record = {"set": "a", "recipe": "r", "seed": 0, "steps": 10, "cpu_s": 60, "scores": {"byol": {"linear": 50.0, "knn": 40.0}}}
    kept, out = tmp_path / "kept.json", tmp_path / "out"
    kept.write_text(json.dumps([{"table": "other", **record}, {"table": "recipes", **record, "seed": 7}]))
    out.mkdir()
    (out / "a-r-0.json").write_text(json.dumps(record))
    main(["--sets", str(tmp_path), "--out", str(out), "--keep", str(kept)])
    assert [(each["table"], each["seed"]) for each in json.loads(kept.read_text())] == [("other", 0), ("recipes", 0)]
    assert capsys.readouterr().out.splitlines() == table([record])


def test_letters_are_whole_pieces_come_from_the_picture_and_icons_lie_on_white():
    rng = np.random.default_rng(0)
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    for letter in "bdpq":
        pixels = draw_letter(font, letter, rng)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert edge.min() > 100, "no stroke leaves the canvas"
        assert pixels.min() < 60
    picture = np.zeros((200, 300, 3), dtype=np.uint8)
    picture[..., 1] = 90
    piece = random_piece(picture, rng)
    assert piece.shape == (48, 48, 3)
    assert np.unique(piece[..., 1]).tolist() == [90]
    assert on_white(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    share = np.mean([split_of(f"name{i}") == "val" for i in range(2000)])
    assert share == pytest.approx(0.25, abs=0.03)
