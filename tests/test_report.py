"""The report and the command line, on a run folder with a real, tiny checkpoint and a folder of real JPEG images."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbyol import __version__
from fastbyol.__main__ import main
from fastbyol.byol import build_byol
from fastbyol.config.plain import to_plain
from fastbyol.config.presets import PRESETS
from fastbyol.config.schema import DataConfig, ModelConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_loader
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.figures import COLLAPSE_PANELS, curves
from fastbyol.evaluation.gallery import display_pixels, draw_views, nearest_neighbours
from fastbyol.evaluation.page import image_grid, table
from fastbyol.evaluation.splits import open_splits
from fastbyol.evaluation.training_log import throughput
from fastbyol.run.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint, save_checkpoint

CLASSES = ("blue & <b>", "green", "red")
VIEWS = ViewPair(size_px=16)
COLLAPSE_TEXT = "collapse: every image gets the same projection"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """8 + 4 images of each class: a colour, with noise."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, num in (("train", 8), ("val", 4)):
        for channel, name in enumerate(reversed(CLASSES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=92)
    return root


@pytest.fixture
def run(data, tmp_path) -> Path:
    """A run folder as training leaves it, at step 20."""
    folder = tmp_path / "run"
    model = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8)
    config = TrainConfig(out=str(folder), epochs=5, global_batch=8, model=model, views=VIEWS, data=DataConfig(train=str(data / "train")))
    torch.manual_seed(1)
    byol = build_byol(model, num_classes=3)
    save_checkpoint(folder, step=20, state={"config": to_plain(config), "step": 20, "byol": byol.state_dict()}, keep=2)
    signs = {"projection_std": 0.8, "feature_std": 0.4, "effective_rank": 5.0, "mean_cosine": 0.1, "alignment": 0.7}
    records = [
        {"step": s, "epoch": s / 4, "loss": 4 - s / 10, "lr": 0.1, "tau": 0.99, "probe_top1": 0.3, **signs}
        | {"images_per_s": 10.0 * s, "images_per_s_per_device": 5.0 * s, "data_wait_share": 0.25, "alarm": None}
        for s in (4, 9, 14, 19)
    ]
    records[-1]["alarm"] = COLLAPSE_TEXT
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    provenance = {"command": "fastbyol/train.py --out run", "commit": "abc123", "torch_threads": 2, "world_size": 2, "gpu": None}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of the command line."""
    try:
        main(arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_report_is_one_page_with_every_section_and_nothing_from_outside(run, data, capsys):
    code, out, err = call(["report", "--run", str(run), "--data", str(data), "--batch", "8", "--device", "cpu"], capsys)
    assert code == 0, err
    html = (run / "report.html").read_text()
    names = re.findall(r'<section id="(\w+)">', html)
    assert names == [
        *("headline", "labelfree", "views", "training", "collapse", "neighbours", "clusters", "map", "odd"),
        *("configuration", "provenance", "commands"),
    ]
    assert '<link rel="icon" href="data:,">' in html, "else a browser asks the server of the page for an icon"
    assert not re.search(r'(?:src|href)="(?!data:(?:image/png;base64)?,)|url\(|<script|@import|https?://', html)
    assert "torchrun --nproc-per-node 2 fastbyol/train.py --out run" in html
    assert f"python -m fastbyol report --run {run}" in html
    assert "abc123" in html
    assert f"step 20: {COLLAPSE_TEXT}" in html
    assert "blue &amp; &lt;b&gt;" in html
    assert "blue & <b>" not in html
    # median of 45, 70, 95 images/s: the first logged step is left out
    assert "70 images/s" in html
    assert "per CPU process with 2 threads" in html
    assert "70 images/s" in out
    linear = json.loads((run / "evaluation" / "linear.json").read_text())
    assert f"{100 * linear['scores']['byol']['top1']:.1f} %" in out
    views = html[html.index('id="views"') : html.index('id="training"')]
    assert views.count("<img") == 6 * (1 + 2 * 3)


def test_the_report_takes_what_evaluate_has_written_and_evaluates_anew_after_more_training(run, data, capsys):
    arguments = ["--data", str(data), "--batch", "8", "--device", "cpu"]
    assert call(["evaluate", "all", "--checkpoint", str(run), *arguments, "--k", "3"], capsys)[0] == 0
    path = run / "evaluation" / "knn.json"
    written = json.loads(path.read_text())
    assert written["settings"]["k"] == 3
    assert written["step"] == 20
    assert call(["report", "--run", str(run), *arguments], capsys)[0] == 0
    assert json.loads(path.read_text()) == written
    path.write_text(json.dumps(written | {"step": 10}))
    assert call(["report", "--run", str(run), *arguments], capsys)[0] == 0
    assert json.loads(path.read_text())["step"] == 10, "of other settings than the report's own, which has a file beside it"
    again = json.loads(path.with_name("knn-2.json").read_text())
    assert (again["step"], again["settings"]["k"]) == (20, 20)


@pytest.mark.parametrize("command", [("evaluate", "knn", "--checkpoint"), ("report", "--run")])
def test_a_checkpoint_that_training_writes_meanwhile_changes_neither_the_scores_nor_their_step(command, run, data, capsys, monkeypatch):
    where = (str(run), "--data", str(data), "--batch", "8", "--device", "cpu")

    def open_after_another_step(*given: object, **options: object) -> object:
        """What the command does next after it has read the run; training has gone on by then, and its network has become blind."""
        state = load_checkpoint(checkpoint_path(run, 20))
        state["byol"]["online.encoder.conv1.weight"].zero_()
        save_checkpoint(run, step=40, state=state | {"step": 40}, keep=1)  # and the one that was read is gone
        return open_splits(*given, **options)

    def scored() -> tuple[int, float]:
        result = json.loads((run / "evaluation" / "knn.json").read_text())
        return result["step"], result["scores"]["byol"]["top1"]

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr("fastbyol.evaluation.splits.open_splits", open_after_another_step)
        assert call([*command, *where], capsys)[0] == 0
    assert checkpoint_steps(run) == [40]
    assert scored() == (20, 1.0)
    assert call(["evaluate", "knn", "--checkpoint", *where], capsys)[0] == 0
    step, top1 = scored()
    assert step == 40
    assert top1 < 0.5, "the checkpoint that came meanwhile has other scores"


def test_linear_evaluation_alone_writes_its_file_and_prints_all_subjects(run, data, capsys):
    code, out, _ = call(["evaluate", "linear", "--checkpoint", str(run), "--data", str(data), "--device", "cpu"], capsys)
    assert code == 0
    assert [p.name for p in (run / "evaluation").iterdir()] == ["linear.json"]
    for title in ("BYOL", "untrained encoder", "PCA of raw pixels", "chance"):
        assert title in out


def test_views_of_the_report_are_those_that_the_run_saw(data):
    config = DataConfig(train=str(data / "train"), workers=1)
    seen = {}
    with build_loader(config, views=VIEWS, seed=3, global_batch=8) as loader:
        loader.set_epoch(1)
        for batch in loader:
            seen.update((int(i), (a, b)) for i, a, b in zip(batch.index, batch.view1, batch.view2, strict=True))
    with build_loader(config, views=VIEWS, seed=3, global_batch=1) as loader:
        drawn = draw_views(loader, index=[13, 2], epochs=2)
    for row, sample in enumerate((13, 2)):
        assert torch.equal(drawn[row, 2], seen[sample][0])
        assert torch.equal(drawn[row, 3], seen[sample][1])
    assert not torch.equal(drawn[0, 0], drawn[0, 2])


def test_display_pixels_undo_the_normalisation():
    pixels = torch.tensor([[0, 128, 255]]).view(1, 3, 1, 1)
    normalised = (pixels / 255 - torch.tensor(VIEWS.mean).view(1, 3, 1, 1)) / torch.tensor(VIEWS.std).view(1, 3, 1, 1)
    assert display_pixels(normalised, views=VIEWS).tolist() == [[[[0, 128, 255]]]]


def test_the_neighbour_grid_asks_for_one_image_of_each_class_and_finds_the_nearest():
    axes = torch.eye(3)
    label = torch.tensor([2, 2, 1, 0, 2])
    val = Features(axes[label], label, torch.arange(5))
    train = Features(axes * 5, torch.arange(3), torch.arange(3))
    found = nearest_neighbours(train, val, queries=3, k=9)
    assert label[found.query].tolist() == [0, 1, 2]
    assert found.neighbour.shape == (3, 3)
    assert found.neighbour[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.similarity[:, 0], 1.0, rtol=1e-6)


def test_speed_on_a_gpu_and_on_a_cpu_are_called_by_different_names():
    record = {"step": 1, "images_per_s_per_device": 3.0, "data_wait_share": None}
    assert throughput([record], {"gpu": "NVIDIA H100"}).per == "GPU (NVIDIA H100)"
    assert throughput([record], {"torch_threads": 1}).per == "CPU process with 1 thread"
    assert throughput([record], {}).images_per_s_per_device == 3.0


def test_curves_of_a_short_log_with_unmeasured_values_are_a_picture():
    png = curves([{"step": 0, "projection_std": None, "mean_cosine": 0.5}], COLLAPSE_PANELS)
    assert png.startswith(b"\x89PNG")


def test_text_in_tables_is_escaped_and_numbers_are_aligned():
    html = table(["a<", "n"], rows=[["x&y", "1"]], numbers=frozenset({1}))
    assert "a&lt;" in html
    assert '<td>x&amp;y</td><td class="number">1</td>' in html
    assert '<th class="gap">h&gt;</th>' in image_grid(["h>"], rows=[], gaps=frozenset({0}))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "linear", "--checkpoint", "missing", "--data", "DATA"], "missing"),
        (["evaluate", "linear", "--checkpoint", "RUN", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["evaluate", "knn", "--checkpoint", "RUN", "--data", "DATA", "--k", "999"], "k = 999"),
        (["evaluate", "linear", "--checkpoint", "RUN", "--data", "DATA", "--k", "5"], "--k: is not an option of evaluate linear"),
        (["evaluate", "linear", "--checkpoint", "RUN", "--data", "DATA", "--batch", "0"], "--batch = 0"),
        (["evaluate", "linear", "--checkpoint", "RUN", "--data", "DATA", "--batsch", "8"], "--batsch"),
        (["evaluate", "quadratic", "--checkpoint", "RUN", "--data", "DATA"], "quadratic"),
        (["evaluate", "linear", "--data", "DATA"], "--checkpoint"),
        (["report", "--data", "DATA"], "--run"),
        (["fly"], "fly"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(run, data, capsys, arguments, said):
    real = {"RUN": str(run), "DATA": str(data)}
    code, out, err = call([real.get(a) or a for a in arguments], capsys)
    lines = [line for line in err.splitlines() if not line.startswith("...")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("fastbyol: error: ")
    assert said in lines[0]


def test_a_run_that_has_not_logged_is_a_one_line_error(run, data, capsys):
    (run / "metrics.jsonl").unlink()
    code, _, err = call(["report", "--run", str(run), "--data", str(data)], capsys)
    assert code == 2
    assert "no logged step" in err
    assert not (run / "report.html").exists()


def test_help_version_and_presets_list_the_commands_and_presets(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastbyol"])
    assert "evaluate" in call([], capsys)[1]
    assert call(["--version"], capsys) == (0, f"fastbyol {__version__}\n", "")
    listing = call(["presets"], capsys)[1]
    for name, preset in PRESETS.items():
        assert preset.command(name) in listing
        assert preset.expected in listing
        assert preset.source in listing
