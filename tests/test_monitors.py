"""The signs of collapse on batches whose answer is known."""

from __future__ import annotations

import pytest
import torch

from fastbyol.byol import BYOLOutput
from fastbyol.config.errors import UserError
from fastbyol.monitors import COLLAPSED_STD, PATIENCE, CollapseAlarm, Monitor, collapse_signs


def test_projections_spread_evenly_read_one_full_rank_and_no_common_direction():
    signs = collapse_signs(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)), torch.randn(4000, 8))
    assert signs["projection_std"] == pytest.approx(1.0, abs=0.02)
    assert signs["effective_rank"] == pytest.approx(16, abs=0.1)
    assert signs["mean_cosine"] == pytest.approx(0.0, abs=0.01)


def test_equal_projections_read_as_collapsed():
    signs = collapse_signs(torch.ones(64, 16) + 1e-6 * torch.randn(64, 16), torch.randn(64, 8))
    assert signs["projection_std"] < 1e-4
    assert signs["mean_cosine"] == pytest.approx(1.0, abs=1e-5)


def test_projections_on_one_line_have_rank_one():
    signs = collapse_signs(torch.randn(256, 1) * torch.randn(1, 16), torch.randn(256, 8))
    assert signs["effective_rank"] == pytest.approx(1.0, abs=0.01)


def test_mean_cosine_equals_the_loop_over_all_pairs():
    x = torch.randn(9, 5, dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i in range(9) for j in range(9) if i != j]
    assert collapse_signs(x, x)["mean_cosine"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_the_alarm_needs_patience_and_forgets_after_a_healthy_record():
    alarm = CollapseAlarm()
    collapsed = {"alignment": 0.999, "projection_std": COLLAPSED_STD / 2}
    assert [alarm.check(**collapsed) for _ in range(PATIENCE - 1)] == [None] * (PATIENCE - 1)
    assert "model.predictor_layers" in alarm.check(**collapsed)
    assert alarm.check(alignment=0.7, projection_std=0.8) is None
    assert alarm.check(**collapsed) is None


def test_views_that_agree_while_images_differ_are_no_alarm():
    alarm = CollapseAlarm()
    assert [alarm.check(alignment=0.999, projection_std=0.7) for _ in range(10)] == [None] * 10


def _output(loss: float) -> BYOLOutput:
    return BYOLOutput(
        torch.tensor(loss), torch.tensor(0.5), torch.tensor(1.0), torch.tensor([True, False]), torch.randn(8, 4), torch.randn(8, 4)
    )


def test_a_record_averages_its_interval_and_the_next_one_starts_anew():
    monitor = Monitor(global_batch=8, world_size=2, device=torch.device("cpu"))
    for loss in (1.0, 3.0):
        monitor.add(_output(loss))
        monitor.step()
    record = monitor.record(step=1, epoch=0.1, lr=0.1, tau=0.9, last=_output(3.0))
    assert record["loss"] == pytest.approx(2.0)
    assert record["probe_top1"] == pytest.approx(0.5)
    assert record["images_per_s"] == pytest.approx(2 * record["images_per_s_per_device"])
    monitor.add(_output(5.0))
    monitor.step()
    assert monitor.record(step=2, epoch=0.2, lr=0.1, tau=0.9, last=_output(5.0))["loss"] == pytest.approx(5.0)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step():
    monitor = Monitor(global_batch=8, world_size=1, device=torch.device("cpu"))
    monitor.add(_output(float("nan")))
    monitor.step()
    with pytest.raises(UserError, match="loss = nan at step 7"):
        monitor.record(step=7, epoch=0.1, lr=0.1, tau=0.9, last=_output(1.0))
