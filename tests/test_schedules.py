"""Schedules against the official code's golden values and closed forms."""

from pathlib import Path

import numpy as np
import pytest

from fastbyol.config.presets import PRESETS
from fastbyol.schedules import lr_at, tau_at, total_steps_at

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedules.npz")
RUNS = sorted({name.rsplit("_", 1)[0] for name in GOLDEN.files if name.endswith("_cfg")})
IMAGENET = 1_281_167


@pytest.mark.parametrize("run", RUNS)
def test_learning_rate_and_tau_equal_the_official_schedules(run):
    total, warmup, batch, base_lr, tau_base = GOLDEN[f"{run}_cfg"][:5]
    peak = base_lr * batch / 256
    for k, lr, tau in zip(GOLDEN[f"{run}_k"], GOLDEN[f"{run}_lr_f64"], GOLDEN[f"{run}_tau_f64"], strict=True):
        ours = lr_at(int(k), total_steps=int(total), warmup_steps=int(warmup), base_lr=base_lr, global_batch=int(batch))
        # Their warm-up branch is computed in float32: 6e-8 of the peak was measured, ten times that allowed.
        assert abs(ours - lr) <= 6e-7 * peak
        if k <= total:
            assert abs(tau_at(int(k), total_steps=int(total), tau_base=tau_base) - tau) <= 1e-15


@pytest.mark.parametrize(
    ("preset", "steps", "warmup", "peak"),
    [("r50_40ep", 12511, 3127, 7.2), ("r50_100ep", 31278, 3127, 7.2), ("r50_300ep", 93835, 3127, 4.8), ("r50_1000ep", 312784, 3127, 3.2)],
)
def test_paper_presets_have_the_published_steps_and_peak_learning_rate(preset, steps, warmup, peak):
    config = PRESETS[preset].config
    assert total_steps_at(config.epochs, num_samples=IMAGENET, global_batch=config.global_batch) == steps
    assert total_steps_at(config.optim.warmup_epochs, num_samples=IMAGENET, global_batch=config.global_batch) == warmup
    top = lr_at(warmup, total_steps=steps, warmup_steps=warmup, base_lr=config.optim.base_lr, global_batch=config.global_batch)
    assert top == pytest.approx(peak, rel=1e-12)


def test_small_batch_preset_has_the_steps_of_batch_512():
    config = PRESETS["r50_1000ep_batch512"].config
    assert total_steps_at(config.epochs, num_samples=IMAGENET, global_batch=config.global_batch) == 2502279


def test_the_first_step_with_warm_up_has_learning_rate_zero_and_the_last_step_still_moves_the_target():
    assert lr_at(0, total_steps=100, warmup_steps=10, base_lr=0.3, global_batch=4096) == 0.0
    assert tau_at(0, total_steps=100, tau_base=0.99) == pytest.approx(0.99, abs=1e-15)
    assert tau_at(50, total_steps=100, tau_base=0.99) == pytest.approx(0.995, abs=1e-15)
    assert 0.99 < tau_at(99, total_steps=100, tau_base=0.99) < 1.0


def test_a_run_of_warm_up_only_stays_at_its_peak():
    assert lr_at(10, total_steps=10, warmup_steps=10, base_lr=1.0, global_batch=256) == 1.0
