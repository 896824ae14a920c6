"""Figures in README and docs are those of kept records and of the roofline; the roofline's arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the suite runs from a checkout and is not installed

from benchmarks import figures, roofline  # noqa: E402
from benchmarks.record_file import newest_kept, read_record  # noqa: E402
from fastbyol.config.errors import UserError  # noqa: E402
from fastbyol.config.schema import ModelConfig  # noqa: E402

RESNET50 = ModelConfig(encoder="resnet50")
A100, H100, _ = roofline.CARDS


@pytest.mark.parametrize("name", figures.FILES)
def test_every_figure_in_the_pages_tables_is_that_of_a_kept_record_or_of_the_roofline(name: str):
    text = (ROOT / name).read_text()
    assert "<!-- figures: " in text
    assert figures.with_figures(text, figures.BLOCKS) == text, "python -m benchmarks.figures --write"


def test_the_readme_quotes_the_newest_record_digit_by_digit():
    """Read from the record by hand, not through the code that writes the table."""
    folder = newest_kept("loader")
    assert folder is not None
    rows = {row["name"]: row for row in read_record(folder)["cases"]["loader"]["rows"]}
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| two 224 px views"))
    for label, row in (("FFCV", "ffcv: views"), ("DALI", "dali: views"), ("folder", "folder: views"), ("", "torchvision on Pillow: views")):
        assert f"{label or row} {rows[row]['ms']['cpu']['median']:#.3g}" in line


def test_the_page_on_stores_quotes_the_newest_record_of_its_curve():
    """Read from the record by hand, not through the code that writes the table."""
    folder = newest_kept("store")
    assert folder is not None
    rows = read_record(folder)["cases"]["store"]["rows"]
    page = (ROOT / "docs/stores.md").read_text()
    for delay_ms in (0, 5, 50):
        row = next(row for row in rows if row["name"] == f"store, + {delay_ms} ms")
        assert row["extra"]["ms of a round trip"] >= delay_ms  # the delay was there
        assert f"| store, + {delay_ms} ms | {1000 / row['ms']['wall']['median']:.0f} | {row['speedup']['wall']['median']:.2f} (" in page


def test_the_first_line_is_the_ratio_to_rivals_at_their_best_once_a_record_has_it(tmp_path: Path):
    lines, sources = figures.rivals_lines(tmp_path)
    assert lines[0][1:] == ["not in a kept record yet", "solo-learn's module at its best, lightly's blocks at their best", ""]
    assert not sources
    record = json.loads(((newest_kept("step", rows=["bf16, channels-last"]) or tmp_path) / "records.json").read_text())
    rows = record["cases"]["step"]["rows"] = [row for row in record["cases"]["step"]["rows"] if row["role"] != "rival"]
    ours = next(row for row in rows if row["name"] == "bf16, channels-last")
    for name, times_slower in (("solo-learn's module at its best", 1.25), ("lightly's blocks at their best", 1.1)):
        speedup = {clock: {key: value / times_slower for key, value in each.items()} for clock, each in ours["speedup"].items()}
        rows.append({**ours, "name": name, "role": "rival", "speedup": speedup})
    (tmp_path / "of_bf16").mkdir()
    (tmp_path / "of_bf16" / "records.json").write_text(json.dumps(record))
    assert "(bf16, channels-last, foreach)" in figures.rivals_lines(tmp_path)[0][0][0]
    assert figures.rivals_lines(tmp_path)[0][0][1] == "1.25 and 1.10"
    assert figures.measured_table(tmp_path).splitlines()[2].startswith("| BYOL step, resnet50 at 224 px, beside rivals at their best")

    # A newer record, of a CPU without bf16: the ratio is its, in float32; the time of a step in bf16 stays the older one's.
    record["cases"]["step"]["rows"] = [row for row in rows if not row["name"].startswith("bf16, channels-last")]
    (tmp_path / "of_float32").mkdir()
    (tmp_path / "of_float32" / "records.json").write_text(json.dumps(record | {"started": "2030-01-01T00:00:00"}))
    lines, sources = figures.rivals_lines(tmp_path)
    assert "(float32, channels-last, foreach)" in lines[0][0]
    assert list(sources) == [tmp_path / "of_float32"]
    assert f"bf16, channels-last {ours['ms']['cpu']['median']:.0f}" in figures.measured_table(tmp_path)


def test_a_changed_figure_is_found_and_put_right():
    text = "before\n<!-- figures: x (a command) -->\n| 1.5 |\n<!-- figures end -->\nafter 1.5\n"
    assert figures.with_figures(text, {"x": lambda: "| 2.5 |\n"}) == text.replace("| 1.5 |", "| 2.5 |")
    with pytest.raises(UserError, match="x: no such table; one of y"):
        figures.with_figures(text, {"y": lambda: ""})


def test_elements_are_counted_by_what_reads_and_writes_them():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(x))
            return torch.relu_(x + x)

    found = roofline.count_elements(Block(), torch.empty(2, 3, 16, 16))
    out = 8 * 8 * 8
    assert found == roofline.Elements(conv_in=3 * 16 * 16, conv_out=out, norm=out, relu=out, add=out)
    # By hand: conv in + out, norm 3, relu 2, add 3; backward conv twice that, norm 5, relu 3, add 3.
    assert roofline.separate_passes(found) == (768 + 9 * out, 2 * 768 + 13 * out)
    assert roofline.fused_passes(found) == (768 + 5 * out, 2 * 768 + 10 * out)


def test_resnet50_has_its_published_activations_and_operations():
    """Operations: 4.09 G multiply-adds forward (torchvision's model card); activations of all convolutions 11.1 M (Radosavovic et al., 2020, table 7)."""
    with torch.device("meta"):
        elements = roofline.count_elements(roofline.encoder_from(RESNET50), torch.empty(1, 3, 224, 224))
    assert elements.conv_out == pytest.approx(11.1e6, rel=0.01)
    # Online forward and backward is three forwards less the stem's input gradient, the target one more; two views; two operations each.
    stem = 64 * 112**2 * 3 * 7**2
    heads = (2048 * 4096 + 4096 * 256, 256 * 4096 + 4096 * 256)
    multiply_adds = 2 * (4 * 4.0871e9 - stem + 4 * heads[0] + 3 * heads[1])
    assert roofline.work_of(RESNET50).flop == pytest.approx(2 * multiply_adds, rel=0.002)


def test_the_model_holds_what_is_published_for_supervised_resnet50_training():
    """NVIDIA DeepLearningExamples: A100 2,470 (PyTorch) and 3,410 (MXNet) images/s; MLPerf Training v3.0: H100 7,010."""
    with torch.device("meta"):
        elements = roofline.count_elements(roofline.encoder_from(RESNET50), torch.empty(1, 3, 224, 224))
    flop = 2 * 3 * 4.09e9
    low, high = roofline.attainable(flop, roofline.HALF * sum(roofline.separate_passes(elements)), A100)
    assert low < 2470 < 3410 < high
    assert (round(low, -2), round(high, -2)) == (2400, 3700)  # as docs/performance.md says
    low, high = roofline.attainable(flop, roofline.HALF * sum(roofline.fused_passes(elements)), H100)
    assert low < 7010 < high
    assert (round(low, -2), round(high, -2)) == (5900, 8100)


def test_limits_are_peaks_over_work():
    work = roofline.Work(flop=1e9, separate_bytes=2e9, fused_bytes=1e9)
    assert roofline.limits(work, A100) == {"operations": 312e12 / 1e9, "separate": 2.04e12 / 2e9, "fused": 2.04e12 / 1e9}


def test_messages_of_resnet50():
    """53 batch norms in the encoder and one in each head; channels 26,560 in the encoder, 4096 in each head."""
    sent = roofline.messages_of(RESNET50)
    assert sent.norm_layers == (55, 54)
    assert sent.norm_messages == 164
    online, target = 26560 + 2 * 4096, 26560 + 4096
    assert sent.norm_bytes == 4 * (4 * (online + target) + 109)
    assert sent.norm_backward_bytes == 4 * 4 * online
    assert sent.gradient_bytes == pytest.approx(4 * (35.07e6 + 2048 * 1000), rel=0.001)
    assert roofline.all_reduce_s(8e9, ranks=4, bytes_per_s=1e9) == 12.0
    assert roofline.all_gather_s(1e9, ranks=4, bytes_per_s=1e9) == 3.0
