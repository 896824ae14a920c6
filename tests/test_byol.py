"""The method: a whole optimizer step against an independent, straightforward implementation; what moves and what must not."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbyol.byol import BYOL, build_byol
from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig, ObjectiveConfig, PrecisionConfig
from fastbyol.models import encoder_from
from fastbyol.models.view_batchnorm import convert_to_batchnorm
from fastbyol.optim.lars import LARS
from fastbyol.optim.param_groups import byol_param_groups
from fastbyol.run import precision
from fastbyol.run.precision import prepare_model
from fastbyol.schedules import lr_at, tau_at

TINY = ModelConfig(encoder="resnet8", stem="small2", hidden_dim=32, projection_dim=16)


def _small_byol(**changes) -> BYOL:
    torch.manual_seed(0)
    return build_byol(ModelConfig(**{**TINY.__dict__, **changes}), num_classes=5).double()


class StraightforwardBYOL:
    """Algorithm 1 of the paper, literally: functional networks over dicts of named tensors, autograd for the loss, loops for the updates.

    Shares only the initial weights with the product: batch norm, loss, LARS, target update and schedules are its own.
    """

    def __init__(
        self, byol: BYOL, *, total_steps: int, warmup_steps: int, base_lr: float, batch: int, tau_base: float, weight_decay: float
    ) -> None:
        self.online = {k: v.detach().clone().requires_grad_() for k, v in byol.online.named_parameters()}
        self.probe = {k: v.detach().clone().requires_grad_() for k, v in byol.probe.named_parameters()}
        self.target = {k: v.detach().clone() for k, v in byol.target.named_parameters()}
        self.momentum = {k: torch.zeros_like(v) for k, v in [*self.online.items(), *((f"probe.{k}", v) for k, v in self.probe.items())]}
        self.total, self.warmup, self.base_lr, self.batch = total_steps, warmup_steps, base_lr, batch
        self.tau_base, self.weight_decay = tau_base, weight_decay

    @staticmethod
    def norm(x, weight, bias):
        axes = (0,) if x.ndim == 2 else (0, 2, 3)
        view = (1, -1) if x.ndim == 2 else (1, -1, 1, 1)
        mean = x.mean(axes, keepdim=True)
        variance = ((x - mean) ** 2).mean(axes, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * weight.view(view) + bias.view(view)

    def encode(self, p, x):
        conv = nn.functional.conv2d
        x = torch.relu(self.norm(conv(x, p["encoder.conv1.weight"], stride=2, padding=1), p["encoder.bn1.weight"], p["encoder.bn1.bias"]))
        for group, stride in ((1, 1), (2, 2), (3, 2)):
            at = f"encoder.layer{group}.0."
            y = conv(x, p[at + "conv1.weight"], stride=stride, padding=1)
            y = torch.relu(self.norm(y, p[at + "bn1.weight"], p[at + "bn1.bias"]))
            y = self.norm(conv(y, p[at + "conv2.weight"], padding=1), p[at + "bn2.weight"], p[at + "bn2.bias"])
            if stride == 2:
                x = conv(x, p[at + "downsample.0.weight"], stride=2)
                x = self.norm(x, p[at + "downsample.1.weight"], p[at + "downsample.1.bias"])
            x = torch.relu(x + y)
        return x.mean((2, 3))

    def mlp(self, p, name, x):
        x = x @ p[f"{name}.0.weight"].T + p[f"{name}.0.bias"]
        return torch.relu(self.norm(x, p[f"{name}.1.weight"], p[f"{name}.1.bias"])) @ p[f"{name}.3.weight"].T

    def step(self, k, view1, view2, label):
        features = [self.encode(self.online, v) for v in (view1, view2)]
        predictions = [self.mlp(self.online, "predictor", self.mlp(self.online, "projector", f)) for f in features]
        targets = [self.mlp(self.target, "projector", self.encode(self.target, v)).detach() for v in (view1, view2)]
        loss = 0.0
        for q, z in ((predictions[0], targets[1]), (predictions[1], targets[0])):
            for i in range(len(q)):
                cosine = (q[i] @ z[i]) / (q[i].norm() * z[i].norm())
                loss = loss + (2 - 2 * cosine) / len(q)
        logits = features[0].detach() @ self.probe["weight"].T + self.probe["bias"]
        cross_entropy = -(logits - torch.logsumexp(logits, 1, keepdim=True))[torch.arange(len(label)), label].mean()
        named = {**self.online, **{f"probe.{n}": v for n, v in self.probe.items()}}
        gradients = dict(zip(named, torch.autograd.grad(loss + cross_entropy, list(named.values())), strict=True))
        self._update(k, named, gradients)
        return loss.item()

    @torch.no_grad()
    def _update(self, k, named, gradients):
        peak = self.base_lr * self.batch / 256
        lr = (
            peak * k / self.warmup
            if k < self.warmup
            else peak * (1 + math.cos(math.pi * (k - self.warmup) / (self.total - self.warmup))) / 2
        )
        for name, w in named.items():
            u = gradients[name]
            if w.ndim > 1:
                u = u + self.weight_decay * w
                u = u * (1e-3 * w.norm() / u.norm())
            self.momentum[name] = 0.9 * self.momentum[name] + u
            w -= lr * self.momentum[name]
        tau = 1 - (1 - self.tau_base) * (math.cos(math.pi * k / self.total) + 1) / 2
        for name in self.target:
            self.target[name] = tau * self.target[name] + (1 - tau) * self.online[name]


@pytest.mark.parametrize("one_pass", [True, False])
def test_five_optimizer_steps_agree_with_a_straightforward_implementation_to_1e_9(one_pass):
    """Checks both ways to move the target: in LARS's own pass, as train_step does, and by a separate call."""
    schedule = {"total_steps": 8, "warmup_steps": 2, "base_lr": 30.0}
    byol = _small_byol().train()
    plain = StraightforwardBYOL(byol, batch=16, tau_base=0.9, weight_decay=1e-4, **schedule)
    optimizer = LARS(byol_param_groups(byol), lr=0.0, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(1)
    for k in range(5):
        view1, view2 = torch.randn(2, 16, 3, 16, 16, generator=generator, dtype=torch.float64)
        label = torch.randint(0, 5, (16,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(k, global_batch=16, **schedule)
        output = byol(view1, view2, label)
        (output.loss + output.probe_loss).backward()
        tau = tau_at(k, total_steps=8, tau_base=0.9)
        if one_pass:
            optimizer.step(target_update=byol.target_update(tau))
        else:
            optimizer.step()
            byol.update_target(tau)
        optimizer.zero_grad()
        assert abs(output.loss.item() - plain.step(k, view1, view2, label)) < 1e-9
    moved = 0.0
    start = _small_byol()
    for ours, expected, before in (
        (byol.online.named_parameters(), plain.online, dict(start.online.named_parameters())),
        (byol.target.named_parameters(), plain.target, dict(start.target.named_parameters())),
        (byol.probe.named_parameters(), plain.probe, dict(start.probe.named_parameters())),
    ):
        for name, value in ours:
            assert (value - expected[name]).abs().max() < 1e-9, name
            moved = max(moved, (value - before[name]).abs().max().item())
    assert moved > 1e-2, "the comparison says nothing unless the weights moved"


def test_each_view_is_normalised_with_its_own_statistics_as_if_it_were_a_batch_of_its_own():
    """Against torch's own batch norm, one view after the other: outputs, gradients and running statistics."""
    byol = _small_byol().train()
    alone = convert_to_batchnorm(copy.deepcopy(byol.online))
    assert isinstance(alone.encoder.bn1, nn.BatchNorm2d)
    assert isinstance(alone.projector[1], nn.BatchNorm1d)
    view1, view2 = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    joint = byol.online(view1, 3 * view2)
    for output, view in zip(joint, (view1, 3 * view2), strict=True):
        expected = alone.predictor(alone.projector(alone.encoder(view)))
        torch.testing.assert_close(output.prediction, expected, rtol=1e-12, atol=1e-12)
        output.prediction.pow(3).sum().backward(retain_graph=True)
        expected.pow(3).sum().backward()
    for (name, ours), theirs in zip(byol.online.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, ours), theirs in zip(byol.online.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


def test_the_target_has_no_gradient_but_its_own_batch_statistics_and_moves_only_in_update_target():
    byol = _small_byol().train()
    before = {k: v.clone() for k, v in byol.target.state_dict().items()}
    view1, view2 = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    output = byol(view1, view2, torch.zeros(6, dtype=torch.long))
    output.loss.backward()
    assert all(p.grad is None for p in byol.target.parameters())
    after = byol.target.state_dict()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed
    assert all("running" in k or "num_batches" in k for k in changed)
    with torch.no_grad():
        byol.online.encoder.conv1.weight.add_(1.0)
    running = byol.target.encoder.bn1.running_mean.clone()
    byol.update_target(0.75)
    torch.testing.assert_close(byol.target.encoder.conv1.weight, before["encoder.conv1.weight"] + 0.25)
    assert torch.equal(byol.target.encoder.bn1.running_mean, running)


def test_the_probe_never_reaches_the_encoder():
    byol = _small_byol().train()
    view1, view2 = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    byol(view1, view2, torch.zeros(6, dtype=torch.long)).probe_loss.backward()
    assert byol.probe.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in byol.online.parameters())


def test_without_a_predictor_the_prediction_is_the_projection():
    byol = _small_byol(predictor_layers=0)
    for out in byol.online(*torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)):
        assert torch.equal(out.prediction, out.projection)


def test_the_target_starts_as_a_copy_of_the_online_network_whatever_the_initialisation():
    for initialisation in ("kaiming", "truncated_normal"):
        byol = _small_byol(initialisation=initialisation)
        online = dict(byol.online.named_parameters())
        assert all(torch.equal(v, online[k]) for k, v in byol.target.named_parameters())


def test_channels_last_and_bf16_change_the_loss_by_rounding_only():
    torch.manual_seed(0)
    byol = build_byol(TINY, num_classes=5)
    view1, view2 = torch.randn(2, 32, 3, 32, 32)
    label = torch.zeros(32, dtype=torch.long)
    plain = byol(view1, view2, label).loss.item()
    byol = byol.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        fast = byol(view1.contiguous(memory_format=torch.channels_last), view2.contiguous(memory_format=torch.channels_last), label).loss
    assert fast.dtype == torch.float32
    assert fast.item() == pytest.approx(plain, abs=0.02)


def _losses_of_fifty_steps(*, fast: bool) -> torch.Tensor:
    """bf16 autocast and channels-last, or float32 and NCHW; two crops of smooth random images."""
    torch.manual_seed(0)
    layout = torch.channels_last if fast else torch.contiguous_format
    byol = build_byol(TINY, num_classes=5).to(memory_format=layout)
    optimizer = LARS(byol_param_groups(byol), lr=0.05, weight_decay=1e-6)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(64, 3, 20, 20, generator=generator).cumsum(2).cumsum(3) / 10
    losses = []
    for _ in range(50):
        index = torch.randint(0, 64, (32,), generator=generator)
        top1, left1, top2, left2 = torch.randint(0, 4, (4,), generator=generator).tolist()
        view1 = images[index, :, top1 : top1 + 16, left1 : left1 + 16].contiguous(memory_format=layout)
        view2 = images[index, :, top2 : top2 + 16, left2 : left2 + 16].flip(3).contiguous(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            output = byol(view1, view2, index % 5)
        (output.loss + output.probe_loss).backward()
        optimizer.step(target_update=byol.target_update(0.9))
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_means_float32_on_a_cpu_without_instructions_for_it(fast, dtype, monkeypatch, caplog):
    monkeypatch.setattr(precision, "is_bf16_fast", lambda device: fast)
    config, cpu = PrecisionConfig(autocast="bf16"), torch.device("cpu")
    layer = prepare_model(nn.Conv2d(3, 4, 3), config, device=cpu)
    with precision.autocast(config, device=cpu):
        assert layer(torch.zeros(1, 3, 8, 8)).dtype == dtype
    assert precision.input_dtype(config, device=cpu) == dtype
    assert ("this CPU has no instructions for it" in caplog.text) == (not fast)


def test_a_gpu_computes_in_bf16_whatever_the_cpu_can():
    assert precision.input_dtype(PrecisionConfig(autocast="bf16"), device=torch.device("cuda")) == torch.bfloat16


def test_fifty_steps_in_bf16_and_channels_last_follow_the_float32_ones():
    """float32 in another memory order differs from itself by up to 0.07 here, as training amplifies rounding; bf16 by 0.08 (0.01 in the mean)."""
    plain, fast = _losses_of_fifty_steps(fast=False), _losses_of_fifty_steps(fast=True)
    assert plain[0] - plain[-1] > 1.5, "the comparison says nothing unless the loss falls"
    assert (fast - plain).abs().max() < 0.2
    assert (fast - plain).mean().abs() < 0.04


class _Smallest(nn.Module):
    """A convolution with batch norm and ReLU: Inductor's C++ takes seconds, a ResNet's a minute."""

    feature_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x))).mean((2, 3))


@pytest.mark.compile
def test_the_whole_forward_and_loss_compile_into_one_graph_and_agree_with_eager_within_bf16_rounding():
    """prepare_model compiles with fullgraph=True, which raises where the graph breaks."""
    torch.manual_seed(0)
    config = PrecisionConfig(autocast="bf16", compile="yes")
    eager = BYOL(_Smallest(), num_classes=3, hidden_dim=16, projection_dim=8)
    compiled = prepare_model(copy.deepcopy(eager), config, device=torch.device("cpu"))
    batch = (*torch.randn(2, 8, 3, 16, 16), torch.zeros(8, dtype=torch.long))
    gradients = []
    for byol in (eager, compiled):
        with precision.autocast(config, device=torch.device("cpu")):
            output = byol(*batch)
        output.loss.backward()
        gradients.append((output.loss.item(), byol.online.encoder.conv.weight.grad))
    (loss, gradient), (compiled_loss, compiled_gradient) = gradients
    assert compiled_loss == pytest.approx(loss, abs=0.03)
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), compiled_gradient.flatten(), dim=0) > 0.99
    assert precision.is_compiled(compiled), "compiled, not fallen back to eager"


def test_without_a_compiler_a_run_goes_on_in_eager_mode_with_one_message(tmp_path):
    code = (
        "import logging, torch; logging.basicConfig(); from fastbyol.run.precision import prepare_model; "
        "from fastbyol.config.schema import PrecisionConfig; "
        "m = prepare_model(torch.nn.Linear(3, 2), PrecisionConfig(compile='yes'), device=torch.device('cpu')); print(m(torch.ones(1, 3)).shape)"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "torch.Size([1, 2])"
    assert done.stderr.count("nothing compiles on this machine") == 1
    assert "no-such-compiler" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"autocast": "tf32"}, "precision.autocast = 'tf32'.*the device is cpu; use bf16 or off"),
        ({"compile": "yes", "compile_mode": "reduce-overhead"}, "precision.compile_mode = 'reduce-overhead': means CUDA graphs"),
        (
            {"compile": "yes", "compile_cache": "{file}/below"},
            r"precision.compile_cache = .*be made or written \(Not a directory\)",
        ),
        (
            {"compile_mode": "max-autotune"},
            "precision.compile_mode = 'max-autotune': must be 'default' where precision.compile is auto and the device cpu",
        ),
        ({"compile_cache": "cache"}, "precision.compile_cache = 'cache': must be '' where precision.compile is auto and the device cpu"),
        ({"compile": "yes", "compile_mode": "fastest"}, "must be one of default, reduce-overhead, max-autotune"),
        ({"gradient_messages": "fp8"}, "precision.gradient_messages = 'fp8': must be one of float32, bf16"),
    ],
)
def test_precision_that_has_no_effect_or_no_hardware_here_is_refused(options, says, tmp_path):
    (tmp_path / "file").write_text("x")
    options = {k: v.format(file=tmp_path / "file") if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=says):
        prepare_model(nn.Linear(3, 2), PrecisionConfig(**options), device=torch.device("cpu"))


GRID = [(predictor, target, beta) for predictor in (2, 0) for target in ("ema", "online", "stop_gradient") for beta in (0.0, 1.0)]


@pytest.mark.parametrize(("predictor_layers", "target", "beta"), GRID)
def test_every_row_of_the_papers_infonce_grid_runs_and_sends_gradients_where_the_paper_says(predictor_layers, target, beta):
    """Tables 5b and 19: with or without predictor, projections of the target, the online network, or that without gradient."""
    torch.manual_seed(0)
    config = ModelConfig(**{**TINY.__dict__, "predictor_layers": predictor_layers})
    byol = build_byol(config, num_classes=5, objective=ObjectiveConfig(beta=beta, alpha=0.1, target=target)).double().train()
    view1, view2 = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    output = byol(view1, view2, torch.zeros(8, dtype=torch.long))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert byol.online.encoder.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in byol.target.parameters())
    online1, online2 = byol.online(view1, view2)
    key1, key2 = byol.target(view1, view2) if target == "ema" else (online1.projection, online2.projection)
    directions = ((online2.prediction, key1), (online1.prediction, key2))
    cosine = sum(torch.nn.functional.cosine_similarity(q, k).mean() for q, k in directions) / 2
    assert output.alignment.item() == pytest.approx(cosine.item(), abs=1e-9)


OBJECTIVES = {
    "layer_norm": (2, ObjectiveConfig(normalization="layer_norm")),
    "batch_norm": (2, ObjectiveConfig(normalization="batch_norm")),
    "none": (2, ObjectiveConfig(normalization="none")),
    "least_squares": (0, ObjectiveConfig(target="stop_gradient", predictor="least_squares")),
}


@pytest.mark.parametrize("row", OBJECTIVES)
def test_the_papers_other_objectives_minimise_their_own_loss_and_still_report_a_cosine(row):
    """Appendices F.6 and I.2, by numpy's means and least squares; views crossed, both directions summed."""
    torch.manual_seed(0)
    predictor_layers, objective = OBJECTIVES[row]
    config = ModelConfig(**{**TINY.__dict__, "predictor_layers": predictor_layers})
    byol = build_byol(config, num_classes=5, objective=objective).double().train()
    view1, view2 = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    output = byol(view1, view2, torch.zeros(8, dtype=torch.long))
    output.loss.backward()
    assert byol.online.encoder.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in byol.target.parameters())
    predictions = [o.prediction.detach().numpy() for o in byol.online(view1, view2)]
    if row == "least_squares":
        keys = predictions  # there is no predictor network: these are the online projections
        predictions = [x @ np.linalg.lstsq(x, key, rcond=None)[0] for x, key in zip(predictions, keys[::-1], strict=True)]
    else:
        keys = [key.numpy() for key in byol.target(view1, view2)]
    pairs = list(zip(predictions, keys[::-1], strict=True))
    cosines = [(q * k).sum(1) / np.linalg.norm(q, axis=1) / np.linalg.norm(k, axis=1) for q, k in pairs]
    assert output.alignment.item() == pytest.approx(np.mean(cosines), abs=1e-7)

    def normalized(x):
        axis = {"layer_norm": 1, "batch_norm": 0}.get(row)
        if axis is None:
            return x if row == "none" else x / np.linalg.norm(x, axis=1, keepdims=True)
        return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5) / np.sqrt(x.shape[1])

    expected = sum(((normalized(q) - normalized(k)) ** 2).sum(1).mean() for q, k in pairs)
    assert output.loss.item() == pytest.approx(expected, rel=1e-7)


def test_simclr_is_the_row_without_predictor_and_target_at_beta_one():
    """NT-Xent written as a loop (Chen et al., 2020, equation 1), times 2 alpha per direction pair."""
    torch.manual_seed(0)
    config = ModelConfig(**{**TINY.__dict__, "predictor_layers": 0})
    byol = build_byol(config, num_classes=5, objective=ObjectiveConfig(beta=1.0, alpha=0.5, target="online")).double().train()
    view1, view2 = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    loss = byol(view1, view2, torch.zeros(6, dtype=torch.long)).loss.item()
    z = torch.cat([output.projection for output in byol.online(view1, view2)]).detach()
    z = z / z.norm(dim=1, keepdim=True)
    nt_xent = 0.0
    for i in range(12):
        j = (i + 6) % 12
        others = [math.exp(float(z[i] @ z[k]) / 0.5) for k in range(12) if k != i]
        nt_xent += -math.log(math.exp(float(z[i] @ z[j]) / 0.5) / sum(others)) / 12
    assert loss == pytest.approx(2 * 0.5 * 2 * nt_xent, abs=1e-9)


def test_the_probe_learns_only_from_labelled_images():
    torch.manual_seed(0)
    byol = BYOL(encoder_from(ModelConfig(encoder="resnet8", stem="small2")), num_classes=3, hidden_dim=8, projection_dim=4)
    view1, view2, label = torch.randn(6, 3, 32, 32), torch.randn(6, 3, 32, 32), torch.tensor([0, 1, -1, 2, -100, 1])
    output = byol(view1, view2, label)
    has_label = label >= 0
    logits = byol.probe(output.feature)
    torch.testing.assert_close(output.probe_loss, F.cross_entropy(logits[has_label], label[has_label]))
    assert output.probe_correct.isnan().tolist() == (~has_label).tolist()
    assert output.probe_correct[has_label].tolist() == (logits.argmax(1) == label)[has_label].float().tolist()
    none = byol(view1, view2, torch.full((6,), -1))
    assert none.probe_loss == 0
    (none.loss + none.probe_loss).backward()
    assert all(p.grad.isfinite().all() for p in byol.online.parameters())
    assert (byol.probe.weight.grad == 0).all()
