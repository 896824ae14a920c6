"""LARS and the target's update against the official code, and the fused forms against their references."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastbyol.config.errors import UserError
from fastbyol.config.schema import OptimConfig
from fastbyol.optim import multi_tensor
from fastbyol.optim.build import build_optimizer
from fastbyol.optim.ema import TargetUpdate, ema_update, ema_update_reference
from fastbyol.optim.lars import LARS, lars_step_reference
from fastbyol.optim.param_groups import byol_param_groups

GOLDEN = Path(__file__).parent / "golden"


def _lars_case(precision):
    golden = np.load(GOLDEN / f"lars_wd1.5e-6_{precision}.npz")
    params = [torch.tensor(golden[f"p{i:02d}_init"]) for i in range(len(golden["names"]))]
    return golden, params


@pytest.mark.parametrize(("precision", "tolerance"), [("f64", 6e-14), ("f32", 2e-5)])
def test_lars_follows_the_official_trajectory(precision, tolerance):
    golden, params = _lars_case(precision)
    groups = [
        {"params": [p for p, adapted in zip(params, golden["adapted"], strict=True) if adapted]},
        {"params": [p for p, adapted in zip(params, golden["adapted"], strict=True) if not adapted], "adapt": False},
    ]
    optimizer = LARS(groups, lr=0.0, weight_decay=float(golden["weight_decay"]))
    for step, lr in enumerate(golden["lr"]):
        for i, p in enumerate(params):
            p.grad = torch.tensor(golden[f"p{i:02d}_grads"][step])
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
        for i, p in enumerate(params):
            trajectory = golden[f"p{i:02d}_params"]
            largest_move = max(np.abs(trajectory - golden[f"p{i:02d}_init"]).max(), 1e-30)
            assert np.abs(p.numpy() - trajectory[step]).max() <= tolerance * largest_move, (golden["names"][i], step)
            buffer = optimizer.state[p]["momentum_buffer"].numpy()
            largest = max(np.abs(golden[f"p{i:02d}_mu"]).max(), 1e-30)
            assert np.abs(buffer - golden[f"p{i:02d}_mu"][step]).max() <= tolerance * largest, (golden["names"][i], step)


def test_the_reference_step_follows_the_official_trajectory_too():
    golden, params = _lars_case("f64")
    for i, p in enumerate(params):
        buffer = torch.zeros_like(p)
        trajectory = golden[f"p{i:02d}_params"]
        largest_move = max(np.abs(trajectory - golden[f"p{i:02d}_init"]).max(), 1e-30)
        for step, lr in enumerate(golden["lr"]):
            gradient = torch.tensor(golden[f"p{i:02d}_grads"][step])
            lars_step_reference(
                p,
                gradient,
                buffer,
                lr=float(lr),
                momentum=0.9,
                weight_decay=float(golden["weight_decay"]),
                trust_coefficient=1e-3,
                adapt=bool(golden["adapted"][i]),
            )
            assert np.abs(p.numpy() - trajectory[step]).max() <= 6e-14 * largest_move


def test_lars_takes_the_learning_rate_as_a_tensor():
    values = []
    for lr in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        p = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
        p.grad = torch.linspace(2, 3, 12, dtype=torch.float64).reshape(3, 4)
        LARS([p], lr=lr, weight_decay=1e-3).step()
        values.append(p)
    assert torch.equal(*values)


def test_lars_resumes_from_its_state_dict():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()

    def steps(module, optimizer, num):
        for _ in range(num):
            optimizer.zero_grad()
            module(torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)).square().sum().backward()
            optimizer.step()

    straight, broken = net(), net()
    make = lambda m: LARS(byol_param_groups(m), lr=0.3, weight_decay=1e-4)  # noqa: E731
    optimizer = make(straight)
    steps(straight, optimizer, 5)
    first = make(broken)
    steps(broken, first, 2)
    second = make(broken)
    second.load_state_dict(first.state_dict())
    steps(broken, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), broken.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": 0.1, "momentum": 1.0},
        {"lr": 0.1, "weight_decay": -1},
        {"lr": 0.1, "trust_coefficient": 0.0},
    ],
)
def test_lars_refuses_values_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be"):
        LARS([torch.zeros(2, 2)], **wrong)


def test_biases_and_batch_norm_skip_decay_and_adaptation_and_frozen_parameters_are_left_out():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    module[3].weight.requires_grad_(False)
    adapted, plain = byol_param_groups(module)
    assert [tuple(p.shape) for p in adapted["params"]] == [(4, 3, 3, 3)]
    assert adapted["adapt"]
    assert sorted(tuple(p.shape) for p in plain["params"]) == [(2,), (4,), (4,), (4,)]
    assert not plain["adapt"]
    assert plain["weight_decay"] == 0


def test_a_submodule_with_a_learning_rate_factor_gets_groups_of_its_own():
    def shapes(group):
        return [tuple(p.shape) for p in group["params"]]

    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2, bias=False))
    weights, own_weights, own_rest = byol_param_groups(module, lr_factors={"1": 2.5, "2": 1.0})
    assert shapes(weights) == [(3, 4)[::-1], (2, 4)]
    assert "lr_factor" not in weights
    assert shapes(own_weights) == [(4, 4)]
    assert (own_weights["lr_factor"], own_weights["adapt"]) == (2.5, True)
    assert shapes(own_rest) == [(4,), (4,), (4,)]
    assert (own_rest["lr_factor"], own_rest["adapt"], own_rest["weight_decay"]) == (2.5, False, 0.0)


@pytest.mark.parametrize(("precision", "tolerance"), [("f64", 2.3e-16), ("f32", 1.2e-7)])
def test_target_update_equals_the_official_code(precision, tolerance):
    golden = np.load(GOLDEN / f"ema_{precision}.npz")
    for k in (0, 500, 1000):
        target = [torch.tensor(golden[f"target_{name}"]) for name in "abc"]
        online = [torch.tensor(golden[f"online_{name}"]) for name in "abc"]
        ema_update(target, online, float(golden[f"tau_k{k}"]))
        for t, name in zip(target, "abc", strict=True):
            expected = golden[f"new_{name}_k{k}"]
            # Exact or one unit in the last place was measured; ten of them allowed.
            np.testing.assert_allclose(t.numpy(), expected, rtol=10 * tolerance, atol=10 * tolerance)


def test_fused_target_update_equals_the_loop_and_takes_tau_as_a_tensor():
    shapes = [(3, 4), (5,), (2, 3, 3, 3), ()]
    online = [torch.randn(s, dtype=torch.float64) for s in shapes]
    start = [torch.randn(s, dtype=torch.float64) for s in shapes]
    results = []
    for update, tau in ((ema_update, 0.99), (ema_update_reference, 0.99), (ema_update, torch.tensor(0.99, dtype=torch.float64))):
        target = [t.clone() for t in start]
        update(target, online, tau)
        results.append(target)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_target_update_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="must match"):
        ema_update([torch.zeros(1)], [], 0.9)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "torch_optimizer_lars", "timm_lars", "timm_lamb"])
def test_every_optimizer_on_offer_lowers_a_loss(name):
    torch.manual_seed(0)
    module = nn.Linear(6, 3)
    x = torch.randn(20, 6)
    optimizer = build_optimizer(OptimConfig(name=name), module)
    losses = []
    for _ in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        optimizer.zero_grad()
        loss = (module(x) - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_torch_optimizers_lars_agrees_with_ours_where_the_decay_is_small():
    from torch_optimizer import LARS as TheirLARS

    start = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = start.clone(), start.clone()
    for p, cls in ((ours, LARS), (theirs, TheirLARS)):
        optimizer = cls([p], lr=0.2, momentum=0.9, weight_decay=1e-6, trust_coefficient=1e-3)
        for _ in range(5):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_timms_lars_agrees_with_ours_where_the_decay_is_small_and_leaves_biases_alone():
    results = []
    for name in ("lars", "timm_lars"):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
        optimizer = build_optimizer(OptimConfig(name=name, weight_decay=1e-6), module)
        for _ in range(5):
            for group in optimizer.param_groups:
                group["lr"] = 0.05
            optimizer.zero_grad()
            module(torch.linspace(-1, 1, 42, dtype=torch.float64).reshape(7, 6)).square().mean().backward()
            optimizer.step()
        results.append(module.state_dict())
    for ours, theirs in zip(results[0].values(), results[1].values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_optimizer_of_timm_that_is_unknown_or_cannot_run_here_or_without_timm_is_named(monkeypatch):
    module = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"'timm_lamp'.*did you mean timm_lamb"):
        build_optimizer(OptimConfig(name="timm_lamp"), module)
    with pytest.raises(UserError, match="'timm_fusedlamb': timm .* cannot make it"):
        build_optimizer(OptimConfig(name="timm_fusedlamb"), module)
    with pytest.raises(UserError, match="optim.name = 'larz': must be one of"):
        OptimConfig(name="larz")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'fastbyol\[timm\]'"):
        build_optimizer(OptimConfig(name="timm_lamb"), module)


SHAPES = [(6, 5, 3, 3), (7, 11, 1, 1), (40, 30), (9,), (30,)]


def _channels_last_params(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in SHAPES]
    return [nn.Parameter(t.to(memory_format=torch.channels_last) if t.ndim == 4 else t) for t in tensors]


def _groups(params):
    return [{"params": params[:3]}, {"params": params[3:], "adapt": False, "weight_decay": 0.0}]


def _set_grads(params, seed, *, scale=1e-2):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, dtype=torch.float64, generator=generator)).to(p.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_several_blocks_channels_last_weights_and_contiguous_gradients_equal_the_reference_in_float64(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(multi_tensor, "BLOCK", 64)
    params = _channels_last_params(dtype)
    expected = [p.detach().double().clone() for p in params]
    buffers = [torch.zeros_like(e) for e in expected]
    optimizer = LARS(_groups(params), lr=0.0, weight_decay=1e-3, trust_coefficient=0.1)
    for step, lr in enumerate((0.0, 0.7, 1.3, 0.4)):
        _set_grads(params, step)
        gradients = [p.grad.clone() for p in params]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for i, (e, g, m) in enumerate(zip(expected, gradients, buffers, strict=True)):
            lars_step_reference(e, g.double(), m, lr=lr, momentum=0.9, weight_decay=1e-3, trust_coefficient=0.1, adapt=i < 3)
        for p, g, e, m in zip(params, gradients, expected, buffers, strict=True):
            assert torch.equal(p.grad, g)
            torch.testing.assert_close(p.double(), e, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(
                optimizer.state[p]["momentum_buffer"].double(), m, rtol=tolerance, atol=tolerance * m.abs().max().item()
            )


def test_the_norm_survives_a_gradient_that_nearly_cancels_the_decay():
    # u = g + wd w is 1e-3 of either term; its norm expanded into products would keep no digit of float32.
    w = torch.linspace(-1, 1, 600).reshape(20, 30)
    p = nn.Parameter(w.clone())
    p.grad = -0.01 * w + 1e-5 * torch.cos(torch.arange(600.0)).reshape(20, 30)
    expected = w.double().clone()
    lars_step_reference(
        expected, p.grad.double(), torch.zeros_like(expected), lr=1.0, momentum=0.0, weight_decay=0.01, trust_coefficient=0.1, adapt=True
    )
    LARS([p], lr=1.0, momentum=0.0, weight_decay=0.01, trust_coefficient=0.1).step()
    move = (expected - w.double()).norm()
    assert (p.detach().double() - expected).norm() < 1e-3 * move


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lars_with_the_target_in_one_pass_equals_a_step_and_then_the_target_update(monkeypatch, dtype):
    monkeypatch.setattr(multi_tensor, "BLOCK", 64)
    results = []
    for fused in (True, False):
        params = _channels_last_params(dtype)
        online = [params[0], params[1], params[3], nn.Parameter(params[0].detach() * 2, requires_grad=False)]  # the last one is frozen
        target = [(p.detach() + 1).clone(memory_format=torch.preserve_format) for p in online]
        optimizer = LARS(_groups(params), lr=0.5, weight_decay=1e-3, trust_coefficient=0.1)
        for step in range(3):
            _set_grads(params, step)
            if fused:
                optimizer.step(target_update=TargetUpdate(target, online, 0.9))
            else:
                optimizer.step()
                ema_update(target, online, 0.9)
        results.append([*params, *target, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    ulp = torch.finfo(dtype).eps
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * ulp, atol=2 * ulp)


def test_a_target_in_another_memory_order_follows_all_the_same():
    params = _channels_last_params(torch.float32)
    target = [torch.zeros(p.shape) for p in params]
    _set_grads(params, 0)
    LARS(_groups(params), lr=0.1).step(target_update=TargetUpdate(target, params, torch.tensor(0.75)))
    for t, p in zip(target, params, strict=True):
        torch.testing.assert_close(t, 0.25 * p.detach(), rtol=1e-6, atol=0)


def test_a_target_update_refuses_lists_that_do_not_match():
    p = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"a target of \(3, 2\) on cpu and \(2, 3\) on cpu online; must be alike"):
        TargetUpdate([torch.ones(3, 2)], [p], 0.9)
    with pytest.raises(ValueError, match="2 target and 1 online tensors; both lists must match"):
        TargetUpdate([torch.ones(2, 3)] * 2, [p], 0.9)


def test_a_contiguous_checkpoint_continues_in_channels_last():
    contiguous = nn.Parameter(torch.arange(24.0).reshape(2, 3, 2, 2))
    channels_last = nn.Parameter(contiguous.detach().clone().to(memory_format=torch.channels_last))
    first, second = (LARS([p], lr=0.1, weight_decay=0.1) for p in (contiguous, channels_last))
    for p in (contiguous, channels_last):
        p.grad = torch.sin(torch.arange(24.0)).reshape(2, 3, 2, 2)
    first.step()
    with torch.no_grad():
        channels_last.copy_(contiguous)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.step()
    second.step()
    torch.testing.assert_close(contiguous, channels_last, rtol=1e-6, atol=1e-6)


def test_lars_refuses_a_parameter_with_holes():
    p = nn.Parameter(torch.zeros(4, 6)[:, :3])
    p.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"strides \(6, 1\): must be dense"):
        LARS([p], lr=0.1).step()


def test_updates_leave_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        p = nn.Parameter(torch.ones(3, 3))
        p.grad = torch.ones(3, 3)
        LARS([p], lr=0.1).step(target_update=TargetUpdate([torch.ones(3, 3)], [p], 0.9))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit_of_an_update():
    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(4)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        target = [torch.randn(shape, generator=generator) for shape in SHAPES]
        optimizer = LARS(_groups(params), lr=0.1, weight_decay=1e-4)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step(target_update=TargetUpdate(target, params, 0.9))
        return [*(p.detach() for p in params), *target]

    before = torch.get_num_threads()
    try:
        assert all(map(torch.equal, run(1), run(3)))
    finally:
        torch.set_num_threads(before)


def test_no_update_reads_a_value_back_from_the_device(monkeypatch):
    # A meta tensor has no values: reading one on the host raises, as a sync would wait on a GPU. torch's fused SGD has no meta kernel.
    calls = []
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *tensors, **options: calls.append(options))
    params = [nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES]
    target = [torch.empty(s, device="meta") for s in SHAPES]
    for p in params:
        p.grad = torch.empty_like(p)
    lr, tau = torch.empty((), dtype=torch.float64, device="meta"), torch.empty((), device="meta")
    LARS(_groups(params), lr=lr, weight_decay=1e-4).step(target_update=TargetUpdate(target, params, tau))
    assert [options["lr"].dtype for options in calls] == [torch.float32, torch.float32]
    with pytest.raises(RuntimeError, match="meta"):
        tau.item()


@pytest.mark.usefixtures("triton_imported_anew")
def test_the_triton_target_update_equals_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    online = [*_channels_last_params(torch.float32), nn.Parameter(torch.linspace(-1, 1, 5000)), nn.Parameter(torch.tensor(3.0))]
    for tau in (0.9, torch.tensor(0.3)):
        target = [p.detach().flip(0) if p.ndim == 1 else -p.detach() for p in online]
        expected = [t.clone() for t in target]
        for _ in range(2):
            ema_update(target, online, tau, backend="triton")
            ema_update_reference(expected, online, float(tau))
        for t, e in zip(target, expected, strict=True):
            torch.testing.assert_close(t, e, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="laid out alike"):
        ema_update([torch.zeros(6, 5, 3, 3)], online[:1], 0.9, backend="triton")
    with pytest.raises(UserError, match="both must be float32"):
        ema_update([torch.zeros(3, dtype=torch.float64)], [torch.zeros(3, dtype=torch.float64)], 0.9, backend="triton")


@pytest.mark.usefixtures("triton_imported_anew")
def test_the_triton_target_update_refuses_tensors_that_are_not_on_cuda(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="on cpu; it needs CUDA"):
        ema_update([torch.zeros(3)], [torch.ones(3)], 0.9, backend="triton")


def test_the_apex_target_update_hands_amp_c_its_lists_and_weights(monkeypatch):
    # The stand-in does what multi_tensor_axpby.cu of apex does: out = a x + b y.
    def axpby(chunk_size, overflow, lists, a, b, arg_to_check):
        for x, y, out in zip(*lists, strict=True):
            out.copy_(a * x + b * y)

    monkeypatch.setitem(sys.modules, "amp_C", SimpleNamespace(multi_tensor_axpby=axpby))
    online = _channels_last_params(torch.float64)
    target = [p.detach() + 1 for p in online]
    expected = [t.clone() for t in target]
    ema_update(target, online, 0.9, backend="apex")
    ema_update_reference(expected, online, 0.9)
    for t, e in zip(target, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=1e-14, atol=1e-14)
    with pytest.raises(UserError, match="tau is a tensor"):
        ema_update(target, online, torch.tensor(0.9), backend="apex")


def test_a_missing_or_unknown_backend_of_the_target_update_is_named(monkeypatch):
    tensors = [torch.zeros(1)]
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(UserError, match="no module amp_C; PyPI's package of that name is a web toolkit"):
        ema_update(tensors, tensors, 0.9, backend="apex")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="triton is not installed"):
        ema_update(tensors, tensors, 0.9, backend="triton")
    with pytest.raises(UserError, match="optim.update = 'foreech': must be one of auto, foreach, triton, apex"):
        ema_update(tensors, tensors, 0.9, backend="foreech")
