"""Output of the monitors on inputs with a known answer."""

from __future__ import annotations

import itertools
import math
import re
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastbyol.byol import BYOLOutput, build_byol
from fastbyol.config.errors import DIVERGED_EXIT, Diverged
from fastbyol.config.presets import preset_config
from fastbyol.config.schema import ModelConfig, MonitorsConfig, ObjectiveConfig, OptimConfig, TrainConfig
from fastbyol.monitors import Monitor
from fastbyol.monitors.collapse import COLLAPSED_STD, FINAL_STD, RANKME_IMAGES, RECORDS_IN_A_ROW, SIGNS, CollapseRule, collapse_signs
from fastbyol.monitors.compute import ComputeMeter, flop_per_image, peak_flop_per_s, peak_memory_gib
from fastbyol.monitors.monitor import StepNorms, global_norm
from fastbyol.monitors.spectrum import effective_rank, participation_ratio, rankme
from fastbyol.monitors.stopwatch import STEPS_KEPT, Stopwatch
from fastbyol.run.checkpoint import checkpoint_path
from fastbyol.run.log import read_metrics
from fastbyol.train import main

CPU = torch.device("cpu")
COLLAPSED = {"alignment": 0.999, "projection_std": FINAL_STD / 2, "epoch": 50.0}
DOUBTFUL = {**COLLAPSED, "projection_std": COLLAPSED_STD / 2}
HEALTHY = {"alignment": 0.7, "projection_std": 0.8, "epoch": 50.0}


def _signs(projection: torch.Tensor, feature: torch.Tensor) -> dict[str, float]:
    return dict(zip(SIGNS, collapse_signs(projection, feature).tolist(), strict=True))


def test_evenly_spread_projections_have_std_one_full_rank_and_no_common_direction():
    signs = _signs(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)), torch.randn(4000, 8))
    assert signs["projection_std"] == pytest.approx(1.0, abs=0.02)
    assert signs["effective_rank"] == pytest.approx(16, abs=0.1)
    assert signs["mean_cosine"] == pytest.approx(0.0, abs=0.01)


def test_equal_projections_are_reported_as_collapsed():
    signs = _signs(torch.ones(64, 16) + 1e-6 * torch.randn(64, 16), torch.randn(64, 8))
    assert signs["projection_std"] < 1e-4
    assert signs["mean_cosine"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shape", [(256, 16), (16, 256)])
def test_projections_on_one_line_have_rank_one(shape):
    signs = _signs(torch.randn(shape[0], 1) * torch.randn(1, shape[1]), torch.randn(shape[0], 8))
    assert signs["effective_rank"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
def test_the_effective_rank_is_that_of_the_singular_values(shape):
    projection = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit = projection / projection.norm(dim=1, keepdim=True)
    singular = torch.linalg.svdvals(unit - unit.mean(dim=0))
    share = singular[singular > 1e-9] / singular.sum()
    assert _signs(projection, projection)["effective_rank"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-6)


def test_rankme_counts_the_directions_of_the_features_whatever_their_mean_and_scale():
    generator = torch.Generator().manual_seed(2)
    isotropic = torch.randn(20_000, 12, generator=generator, dtype=torch.float64)
    assert float(rankme(isotropic)) == pytest.approx(12, abs=0.01)
    assert float(effective_rank(isotropic + 100)) == pytest.approx(12, abs=0.01)
    assert float(participation_ratio(7 * isotropic + 100)) == pytest.approx(12, abs=0.05)
    line = isotropic[:, :1] * torch.ones(12, dtype=torch.float64)
    for rank in (rankme, effective_rank, participation_ratio):
        assert float(rank(line)) == pytest.approx(1, abs=1e-4)
        assert 0 <= float(rank(torch.zeros(5, 3))) < 1.01, "finite where all features are equal"


def test_ranks_of_two_unequal_directions_are_those_of_the_closed_form():
    rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # singular values 3 and 1, variances 9 : 1
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert float(rankme(rows)) == pytest.approx(expected, rel=1e-5)
    assert float(effective_rank(rows)) == pytest.approx(expected, rel=1e-9)
    assert float(participation_ratio(rows)) == pytest.approx(10**2 / (9**2 + 1**2), rel=1e-9)


def test_the_record_has_rankme_of_at_most_the_first_256_features():
    feature = torch.randn(600, 300, generator=torch.Generator().manual_seed(3))
    feature[RANKME_IMAGES:] = 1e6  # never looked at
    assert _signs(torch.randn(600, 4), feature)["rankme"] == pytest.approx(float(rankme(feature[:RANKME_IMAGES])))


def test_mean_cosine_equals_the_loop_over_all_pairs():
    x = torch.randn(9, 5, dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i in range(9) for j in range(9) if i != j]
    assert _signs(x, x)["mean_cosine"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_the_alarm_needs_patience_and_forgets_after_a_healthy_record():
    rule = CollapseRule(TrainConfig())
    assert [rule.check(step=step, **DOUBTFUL) for step in range(RECORDS_IN_A_ROW - 1)] == [None] * (RECORDS_IN_A_ROW - 1)
    assert "collapse since step 1: alignment 0.9990" in (rule.check(step=9, **DOUBTFUL) or "")
    assert rule.check(step=10, **HEALTHY) is None
    assert rule.check(step=11, **DOUBTFUL) is None


@pytest.mark.parametrize("signs", [{"alignment": 0.999, "projection_std": 0.36}, {"alignment": 0.9, "projection_std": 0.01}])
def test_views_that_agree_while_images_differ_and_images_that_agree_while_views_differ_are_no_alarm(signs):
    rule = CollapseRule(TrainConfig())
    assert [rule.check(step=step, epoch=50, **signs) for step in range(1000)] == [None] * 1000
    rule.stop_when_due(list)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (TrainConfig(model=ModelConfig(predictor_layers=0)), "model.predictor_layers 2"),
        (TrainConfig(objective=ObjectiveConfig(target="online")), "objective.target ema"),
        (TrainConfig(model=ModelConfig(predictor_layers=0), objective=ObjectiveConfig(beta=1)), "a smaller optim.base_lr"),
        (TrainConfig(optim=OptimConfig(predictor_lr_factor=0)), "optim.predictor_lr_factor"),
        (
            TrainConfig(model=ModelConfig(predictor_layers=0), objective=ObjectiveConfig(predictor="least_squares")),
            "a smaller optim.base_lr",
        ),
        (TrainConfig(), "a smaller optim.base_lr"),
    ],
)
def test_the_alarm_names_what_in_this_run_is_known_to_collapse(config, says):
    rule = CollapseRule(config)
    assert says in [rule.check(step=step, **COLLAPSED) for step in range(3)][-1]


def _collapsed_rule(*, log_every: int, last_step: int, signs: dict[str, float] = COLLAPSED, **monitors: object) -> CollapseRule:
    rule = CollapseRule(TrainConfig(monitors=MonitorsConfig(collapse_patience=100, **monitors)))  # type: ignore[arg-type]
    rule.check(step=49, **HEALTHY)
    for step in range(49 + log_every, last_step + 1, log_every):
        rule.check(step=step, **signs)
    return rule


def test_a_collapse_that_lasts_ends_the_run_and_names_the_last_checkpoint_from_before():
    with pytest.raises(Diverged, match=r"since step 60 .* stopped after step 160; .* is step 50's; try this: .*stop_on_collapse false"):
        _collapsed_rule(log_every=10, last_step=159).stop_when_due(lambda: [40, 50, 60])
    with pytest.raises(Diverged, match="there is no checkpoint from before"):
        _collapsed_rule(log_every=10, last_step=159).stop_when_due(lambda: [60])


def test_a_run_goes_on_while_a_collapse_is_short_or_doubtful_or_in_the_warm_up_or_records_are_few_or_the_rule_is_off():
    _collapsed_rule(log_every=10, last_step=149).stop_when_due(list)
    _collapsed_rule(log_every=10, last_step=10_000, signs=DOUBTFUL).stop_when_due(list)
    _collapsed_rule(log_every=10, last_step=10_000, signs={**COLLAPSED, "epoch": 9.9}).stop_when_due(list)  # of ten
    _collapsed_rule(log_every=500, last_step=49 + 2 * 500).stop_when_due(list)  # two records: no warning yet, so no end
    _collapsed_rule(log_every=10, last_step=10_000, stop_on_collapse=False).stop_when_due(list)


def test_a_norm_is_taken_over_all_tensors_together():
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 3, 3, 3).contiguous(memory_format=torch.channels_last)]
    flat = [x for t in tensors for x in t.double().flatten().tolist()]
    assert float(global_norm(tensors)) == pytest.approx(sum(x * x for x in flat) ** 0.5, rel=1e-6)
    assert float(global_norm([])) == 0.0


def test_the_update_of_plain_sgd_is_the_learning_rate_times_the_gradient():
    layer, norms = nn.Linear(6, 4), StepNorms()
    layer.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([layer.weight], lr=0.25)
    for _ in range(2):  # the second time in the memory of the first
        optimizer.zero_grad()
        layer(torch.randn(8, 6)).square().sum().backward()
        norms.before_update(layer.parameters())
        optimizer.step()
        norms.after_update()
        gradient, update = norms.take()
        assert layer.weight.grad is not None
        assert float(gradient) == pytest.approx(float(layer.weight.grad.norm()), rel=1e-6)  # type: ignore[arg-type]
        assert float(update) == pytest.approx(0.25 * float(layer.weight.grad.norm()), rel=1e-5)  # type: ignore[arg-type]
    norms.after_update()
    assert norms.take() == (None, None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Clock that advances one second each time it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def test_the_time_of_a_step_is_split_into_waiting_forward_and_backward_and_update(clock):
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch.waiting():  # reads 0 and 1, and the mark 2
            pass
        with stopwatch.waiting():  # 3 and 4: a second micro-batch, one second of which was no computing
            pass
        stopwatch.gradients_ready()  # 5
        stopwatch.step_done()  # 6
    assert stopwatch.wait_s == 4.0
    assert stopwatch.split_ms() == (2000.0, 1000.0)
    stopwatch.reset()
    assert (stopwatch.wait_s, stopwatch.split_ms()) == (0.0, (0.0, 0.0))


def test_a_stopwatch_keeps_a_bounded_number_of_steps():
    stopwatch = Stopwatch(CPU)
    for _ in range(3 * STEPS_KEPT):
        with stopwatch.waiting():
            pass
        stopwatch.gradients_ready()
        stopwatch.step_done()
    assert len(stopwatch._steps) == STEPS_KEPT


@pytest.mark.parametrize("target", ["ema", "online"])
def test_counted_operations_are_the_sum_over_the_layers_of_each_forward_and_backward(target):
    config = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=24, projection_dim=16)
    byol = build_byol(config, num_classes=1)
    macs: dict[str, int] = {}

    def count(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            per_output = module.weight[0].numel()  # type: ignore[index, union-attr]
            macs[name] = per_output * output[0].numel()

        return hook

    for name, module in byol.online.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count(name))
    byol.online(*torch.randn(2, 2, 3, 32, 32))
    online = sum(macs.values())
    target_only = sum(value for name, value in macs.items() if not name.startswith("predictor"))
    # Backward: gradients of weights and inputs, but nobody asks for the images'. Both of two views.
    per_view = online + 2 * online - macs["encoder.conv1"] + (target_only if target == "ema" else 0)
    probe = 128  # features, one class, forward, one view
    assert flop_per_image(config, size_px=32, target=target) == 2 * (2 * per_view + probe)


def test_a_resnet50_at_224_px_takes_the_published_operations():
    """He et al.: 4.1e9 multiply-adds a forward (of torchvision's v1.5, with its classifier 4.09e9); four forwards and two backwards."""
    heads = 2 * (2048 * 4096 + 4096 * 256) + (256 * 4096 + 4096 * 256)
    expected = 2 * 2 * (4 * 4.087e9 + heads * 2)
    assert flop_per_image(ModelConfig(), size_px=224) == pytest.approx(expected, rel=0.01)


def test_counting_operations_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    flop_per_image.cache_clear()
    flop_per_image(ModelConfig(encoder="resnet8", stem="small2", hidden_dim=8, projection_dim=8), size_px=32)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "tflop"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A10", 125),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_the_peak_of_a_known_card_is_its_data_sheets(name, tflop):
    assert peak_flop_per_s(name, autocast="bf16") == 1e12 * tflop


@pytest.mark.parametrize(
    ("name", "autocast"), [("NVIDIA A10G", "bf16"), ("", "bf16"), ("Some Card", "bf16"), ("NVIDIA A100-SXM4-80GB", "off")]
)
def test_an_unknown_peak_is_not_guessed(name, autocast):
    assert peak_flop_per_s(name, autocast=autocast) is None


def test_the_rate_of_operations_is_per_image_times_images_and_a_cpu_has_no_utilisation():
    config = replace(preset_config("cpu_demo"), model=ModelConfig(encoder="resnet8", stem="small2", hidden_dim=8, projection_dim=8))
    rates = ComputeMeter(config, device=CPU).rates(images_per_s_per_device=50.0)
    assert rates["tflop_per_s_per_device"] == pytest.approx(50.0 * flop_per_image(config.model, size_px=32) / 1e12)
    assert rates["mfu"] is None


def test_an_encoder_whose_operations_cannot_be_counted_does_not_end_the_run(monkeypatch, caplog):
    tried = []

    def fails(*args: object, **kwargs: object) -> None:
        tried.append(args)
        raise NotImplementedError("aten::odd on Meta")

    monkeypatch.setattr("fastbyol.monitors.compute.build_byol", fails)
    meter = ComputeMeter(preset_config("cpu_demo"), device=CPU)
    for _ in range(2):
        assert meter.rates(images_per_s_per_device=1.0) == {"tflop_per_s_per_device": None, "mfu": None}
    assert len(tried) == 1
    assert "operations per image could not be counted (NotImplementedError: aten::odd on Meta)" in caplog.text


def test_peak_memory_grows_by_the_memory_that_is_touched():
    before = peak_memory_gib(CPU)
    held = torch.ones(2**28)  # 1 GiB
    assert peak_memory_gib(CPU) >= before
    assert peak_memory_gib(CPU) > 1.0
    del held


def _output(loss: float) -> BYOLOutput:
    return BYOLOutput(
        torch.tensor(loss), torch.tensor(0.5), torch.tensor(1.0), torch.tensor([True, False]), torch.randn(8, 4), torch.randn(8, 4)
    )


def _record(monitor: Monitor, *, step: int, last: BYOLOutput) -> dict[str, object]:
    return monitor.record(step=step, epoch=0.1, lr=0.1, tau=0.9, last=last)


def test_the_probes_accuracy_and_loss_are_means_over_the_images_with_a_label():
    monitor = Monitor(global_batch=8, world_size=1, device=CPU)
    # A micro-batch without a label has a probe loss of 0, which must not count.
    for correct, probe_loss in (([1.0, torch.nan, torch.nan, 0.0], 3.0), ([torch.nan] * 4, 0.0), ([1.0] * 4, 1.5)):
        monitor.add(_output(1.0)._replace(probe_correct=torch.tensor(correct), probe_loss=torch.tensor(probe_loss)))
        monitor.step()
    record = _record(monitor, step=1, last=_output(1.0))
    assert record["probe_top1"] == pytest.approx(5 / 6)
    assert record["probe_loss"] == pytest.approx((2 * 3.0 + 4 * 1.5) / 6)
    monitor.add(_output(1.0)._replace(probe_correct=torch.full((4,), torch.nan)))
    record = _record(monitor, step=2, last=_output(1.0))
    assert (record["probe_top1"], record["probe_loss"]) == (None, None), "no image with a label: unknown, not 0 %"


def test_a_record_averages_its_interval_and_the_next_one_starts_anew():
    monitor = Monitor(global_batch=8, world_size=2, device=CPU)
    for loss in (1.0, 3.0):
        monitor.add(_output(loss))
        monitor.step()
    record = _record(monitor, step=1, last=_output(3.0))
    assert record["loss"] == pytest.approx(2.0)
    assert record["probe_top1"] == pytest.approx(0.5)
    assert record["images_per_s"] == pytest.approx(2 * record["images_per_s_per_device"])
    monitor.add(_output(5.0))
    monitor.step()
    assert _record(monitor, step=2, last=_output(5.0))["loss"] == pytest.approx(5.0)


def test_norms_are_of_the_logged_step_alone_and_unknown_without_one():
    layer, monitor = nn.Linear(3, 2), Monitor(global_batch=8, world_size=1, device=CPU)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for logged in (False, True):
        optimizer.zero_grad()
        monitor.start_step(logged=logged)
        layer(torch.randn(4, 3)).sum().backward()
        monitor.gradients_ready(layer)
        optimizer.step()
        monitor.add(_output(1.0))
        monitor.step()
        record = _record(monitor, step=0, last=_output(1.0))
        if not logged:
            assert record["gradient_norm"] is record["update_norm"] is None
    expected = float(torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]).norm())
    assert record["gradient_norm"] == pytest.approx(expected, rel=1e-6)
    assert record["update_norm"] == pytest.approx(0.5 * expected, rel=1e-5)


def test_a_gradient_that_overflows_leaves_a_record_that_json_can_hold():
    layer, monitor = nn.Linear(3, 2), Monitor(global_batch=8, world_size=1, device=CPU)
    monitor.start_step(logged=True)
    layer.weight.grad = torch.full_like(layer.weight, float("inf"))
    monitor.gradients_ready(layer)
    monitor.add(_output(1.0))
    monitor.step()
    record = _record(monitor, step=0, last=_output(1.0))
    assert record["gradient_norm"] is None
    assert record["update_norm"] == 0.0


def test_paused_time_is_not_counted(clock):
    """The clock is read once at the start, twice around the pause, once by the record: 2 s of 3 are training."""
    monitor = Monitor(global_batch=8, world_size=1, device=CPU)
    with monitor.paused():
        pass
    monitor.add(_output(1.0))
    monitor._steps = 1
    assert _record(monitor, step=0, last=_output(1.0))["images_per_s"] == 4.0


def test_a_run_that_really_collapses_is_ended_and_the_advice_in_its_message_works(data_paths, tmp_path, capsys):
    """No predictor and a large learning rate: of ten runs tried (five seeds, with and without the norm's kernel) the last was over at step 79."""
    options = [
        *("--preset", "cpu_demo", "--epochs", "40", "--global_batch", "8", "--log_every", "2", "--checkpoint_every", "4"),
        *("--data.workers", "1"),
        *("--keep_checkpoints", "30", "--model.hidden_dim", "16", "--model.projection_dim", "8", "--optim.base_lr", "64"),
        *("--model.predictor_layers", "0", "--monitors.collapse_patience", "10"),
        *("--data.train", str(data_paths["folder"]), "--out", str(tmp_path / "run")),
    ]
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == DIVERGED_EXIT
    said = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(
        r"fastbyol: error: collapse: since step (\d+) .* stopped after step (\d+); the last checkpoint from before is step (\d+)'s; .* "
        r"give it a predictor .* (--monitors.stop_on_collapse false)",
        said,
    )
    assert found, said
    first, last, good = (int(found[i]) for i in (1, 2, 3))
    assert good < first < last
    assert checkpoint_path(tmp_path / "run", good).exists()
    records = read_metrics(tmp_path / "run")
    assert records[-1]["step"] + 1 == last  # steps taken, as in the log line; the record counts from 0
    assert "model.predictor_layers 2" in records[-1]["alarm"]
    main([*options, *found[4].split()])
    assert read_metrics(tmp_path / "run")[-1]["step"] == 40 * 25 // 8 - 1  # the last, counted from 0
