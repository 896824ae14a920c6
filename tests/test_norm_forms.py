"""The forms of batch norm over ranks (plain operations, torch's CUDA kernels, our CPU kernel): two ranks against one float64 process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

from fastbyol.models import cuda_norm, sync_batchnorm, view_batchnorm
from fastbyol.models.norm_relu import norm_relu
from fastbyol.models.view_batchnorm import ViewBatchNorm
from tests import cuda_norm_stand_ins
from tests.forked import start_ranks

pytestmark = pytest.mark.distributed

NUM, CHANNELS, VIEWS = 12, 6, 2
ROUNDING = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 1e-2}
FORMS = {
    "plain, summed": ("plain", torch.float64, 0),
    "cuda, gathered": ("cuda", torch.float64, 16),
    "cuda, summed": ("cuda", torch.float64, 0),
    "cuda, bf16": ("cuda", torch.bfloat16, 16),
    "cpu, gathered": ("cpu", torch.float32, 16),
    "cpu, summed": ("cpu", torch.float32, 0),
    "cpu, bf16": ("cpu", torch.bfloat16, 16),
}
"""How the layer works, its input's format, and the largest number of ranks that gather."""
LAYERS = ("norm", "norm of rows", "norm, sum and ReLU")


def _layer(dtype: torch.dtype) -> ViewBatchNorm:
    torch.manual_seed(0)
    layer = ViewBatchNorm(CHANNELS, views=VIEWS, across_ranks=True)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.double() if dtype == torch.float64 else layer


def _inputs(name: str) -> list[Tensor]:
    """Returns input, shortcut and the output's gradient, each (VIEWS, NUM, C, ...), in float64."""
    generator = torch.Generator().manual_seed(1)
    shape = (VIEWS, NUM, CHANNELS) if name == "norm of rows" else (VIEWS, NUM, CHANNELS, 5, 5)
    x, shortcut, gradient = (s * torch.randn(shape, generator=generator, dtype=torch.float64) + s for s in (2.0, 1.0, 3.0))
    if "ReLU" in name:
        # Where rounding moves a value over zero, the gradient passes in one of two results: such places say nothing.
        gradient[(torch.stack(_by_torch(x)[1]) + shortcut).abs() < 0.05] = 0
    return [x, shortcut, gradient]


def _by_torch(x: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """Returns torch's own batch norm with the layer's weights, and its outputs for one view after the other."""
    plain = nn.BatchNorm1d(CHANNELS) if x.dim() == 3 else nn.BatchNorm2d(CHANNELS)
    plain.double().load_state_dict(_layer(torch.float64).state_dict())
    return plain, [plain(view) for view in x]


def _work(call: Callable, layer: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    x, shortcut, gradient = (t.flatten(0, 1).to(dtype).contiguous() for t in inputs)
    if x.dim() == 4:
        x, shortcut, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut, gradient))
    x.requires_grad_()
    y = call(layer, x, shortcut)
    y.backward(gradient)
    by_view = {"y": y.detach().unflatten(0, (VIEWS, -1)), "dx": x.grad.unflatten(0, (VIEWS, -1))}
    return by_view | {"dw": layer.weight.grad, "db": layer.bias.grad} | {n: b.clone() for n, b in layer.named_buffers()}


CALLS: dict[str, Callable] = {
    "norm": lambda layer, x, shortcut: layer(x),
    "norm of rows": lambda layer, x, shortcut: layer(x),
    "norm, sum and ReLU": lambda layer, x, shortcut: norm_relu(layer, x, shortcut),
}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    results = {}
    kernels = cuda_norm_stand_ins.registered()
    for form, (how, dtype, gathered) in FORMS.items():
        for name in LAYERS:
            # Ranks of a GPU have equal shares; those of the other forms need not.
            cut = slice(0, 6) if how == "cuda" else slice(0, 8)
            share = cut if rank == 0 else slice(cut.stop, None)
            inputs = [t[:, share] for t in _inputs(name)]
            with ExitStack() as patched:
                patched.enter_context(mock.patch.object(sync_batchnorm, "GATHERED_RANKS", gathered))
                patched.enter_context(mock.patch.object(cuda_norm, "GATHERED_RANKS", gathered))
                patched.enter_context(mock.patch.object(view_batchnorm, "fits_cuda", return_value=how == "cuda"))
                if how != "cpu":
                    patched.enter_context(mock.patch("fastbyol.models.norm_relu.fits_cpu", return_value=False))
                    patched.enter_context(mock.patch.object(view_batchnorm, "fits_cpu", return_value=False))
                results[f"{form}, {name}"] = _work(CALLS[name], _layer(dtype), inputs, dtype)
    del kernels
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("forms")
    start_ranks(_rank, str(folder))
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]


def _expected(name: str) -> dict[str, Tensor]:
    """One process in float64, a view at a time by torch's own batch norm."""
    x, shortcut, gradient = _inputs(name)
    x.requires_grad_()
    plain, views = _by_torch(x)
    y = torch.stack(views)
    if "ReLU" in name:
        y = torch.relu(y + shortcut)
    y.backward(gradient)
    return {"y": y.detach(), "dx": x.grad, "dw": plain.weight.grad, "db": plain.bias.grad, **dict(plain.named_buffers())}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_two_ranks_what_one_process_has(form: str, name: str, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    first, second = (rank[f"{form}, {name}"] for rank in ranks)
    tolerance = ROUNDING[FORMS[form][1]]
    for key, right in _expected(name).items():
        got = torch.cat([first[key], second[key]], 1) if key in ("y", "dx") else first[key] + (second[key] if key in ("dw", "db") else 0)
        error = (got.double() - right.double()).abs().max()
        assert error <= tolerance * max(1.0, right.double().abs().max()), (key, error)
        if key in dict(_layer(torch.float64).named_buffers()):
            assert torch.equal(first[key], second[key]), "every rank has the same bits"


def test_the_stand_ins_for_torchs_kernels_pass_torchs_own_sync_batch_norm(tmp_path: Path) -> None:
    """Otherwise a misreading of the kernels would be in both the stand-ins and our calls of them."""
    kernels = cuda_norm_stand_ins.registered()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        plain = nn.BatchNorm2d(CHANNELS).double()
        nn.init.normal_(plain.weight)
        x, gradient = torch.randn(2, 8, CHANNELS, 5, 5, dtype=torch.float64)
        running = plain.running_mean.clone(), plain.running_var.clone()
        weight, bias = (p.detach().clone().requires_grad_() for p in (plain.weight, plain.bias))
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        # World size 2 would need a peer; the function itself takes the number only to size the gathered statistics.
        y = SyncBatchNorm.apply(ours, weight, bias, *running, plain.eps, plain.momentum, dist.group.WORLD, 1)
        y.backward(gradient)
        plain(theirs).backward(gradient)
        pairs = [(ours.grad, theirs.grad), (weight.grad, plain.weight.grad), (bias.grad, plain.bias.grad)]
        for got, right in [*pairs, (running[0], plain.running_mean), (running[1], plain.running_var)]:
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    finally:
        dist.destroy_process_group()
    del kernels


def test_on_one_gpu_both_views_are_written_to_one_batch_without_a_copy_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = cuda_norm_stand_ins.registered()
    monkeypatch.setattr(view_batchnorm, "fits_cuda", lambda *_: True)
    result = _work(CALLS["norm"], _layer(torch.float64), _inputs("norm"), torch.float64)
    for key, right in _expected("norm").items():
        torch.testing.assert_close(result[key], right, rtol=1e-10, atol=1e-10)
    del kernels


def test_the_sum_over_many_ranks_loses_nothing_where_the_mean_is_large() -> None:
    """Float32 sums of squares would lose the variance of 1 beside a squared mean of 1e8."""
    generator = torch.Generator().manual_seed(0)
    shares = [10_000 + torch.randn(50, CHANNELS, generator=generator, dtype=torch.float64) for _ in range(3)]
    parts = [(x.mean(0).float()[None], (x.var(0, correction=0) * len(x)).float()[None], torch.tensor([50.0])) for x in shares]
    sent: list[Tensor] = []
    with mock.patch.object(sync_batchnorm, "summed", lambda x, **_: sent.append(x) or x):
        for part in parts:
            sync_batchnorm._sum_statistics(*part)
    with mock.patch.object(sync_batchnorm, "summed", return_value=torch.stack(sent).sum(0)):
        mean, variance, count = sync_batchnorm._sum_statistics(*parts[0])
    whole = torch.cat(shares)
    torch.testing.assert_close(mean[0].double(), whole.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance[0].double(), whole.var(0, correction=0), rtol=1e-3, atol=0)
    assert count.item() == 150
