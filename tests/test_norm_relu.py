"""Norm, sum and ReLU as one operation, against the same in float64 by torch; and memory that a step keeps."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbyol.models import build_encoder
from fastbyol.models.cpu_norm import normalise_on_cpu
from fastbyol.models.norm_relu import norm_relu
from fastbyol.models.view_batchnorm import ViewBatchNorm, convert_to_view_batchnorm

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
"""Tolerance relative to a result's largest value: a few float32 roundings, or the last rounding to bfloat16."""


class _Operations(TorchDispatchMode):
    """Records the names of all operations called inside."""

    def __enter__(self):
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _norm(channels: int, *, views: int = 2) -> ViewBatchNorm:
    norm = ViewBatchNorm(channels, views=views)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def _images(num: int, channels: int, px: int, dtype: torch.dtype, *, mean: float = 0.0) -> Tensor:
    return (mean + torch.randn(num, channels, px, px)).to(dtype).contiguous(memory_format=torch.channels_last)


def _error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def _assert_same_parameter_gradients_and_statistics(norm: nn.Module, exact: nn.Module) -> None:
    in_float32 = [(norm.weight.grad, exact.weight.grad), (norm.bias.grad, exact.bias.grad)]
    in_float32 += [(norm.running_mean, exact.running_mean), (norm.running_var, exact.running_var)]
    assert all(_error(got, right) < 1e-5 for got, right in in_float32)


def _used_kernel(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> bool:
    with _Operations() as operations:
        norm_relu(norm, x, shortcut)
    return "fastbyol.norm_relu.default" in operations.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize(("num", "channels", "px"), [(6, 24, 5), (4, 7, 9), (4, 64, 16), (2, 1024, 3)])
def test_output_gradients_and_statistics_equal_torchs_in_float64_up_to_rounding(dtype, with_shortcut, num, channels, px):
    torch.manual_seed(0)
    norm = _norm(channels)
    exact = copy.deepcopy(norm).double()
    inputs = [_images(num, channels, px, dtype, mean=2.0)] + ([_images(num, channels, px, dtype)] if with_shortcut else [])
    ours, theirs = ([x.to(kind).clone().requires_grad_() for x in inputs] for kind in (dtype, torch.float64))
    output, expected = norm_relu(norm, *ours), F.relu(sum([exact(theirs[0]), *theirs[1:]]))
    gradient = _images(num, channels, px, dtype)
    # Where rounding moves a value over zero, the gradient passes in one of the two: such places say nothing.
    gradient[(expected < 0.02) & ((expected > 0) | (output > 0))] = 0
    output.backward(gradient)
    expected.backward(gradient.double())
    pairs = [(output, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    assert all(_error(got, right) < ROUNDING[dtype] for got, right in pairs)
    _assert_same_parameter_gradients_and_statistics(norm, exact)
    assert int(norm.num_batches_tracked) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_without_relu_gives_the_output_gradients_and_statistics_of_torchs_in_float64(dtype):
    torch.manual_seed(0)
    norm, x, gradient = _norm(24), _images(6, 24, 5, dtype, mean=2.0), _images(6, 24, 5, dtype)
    exact = copy.deepcopy(norm).double()
    ours, theirs = (x.to(kind).clone().requires_grad_() for kind in (dtype, torch.float64))
    assert _used_kernel(norm, x)
    assert norm.num_batches_tracked == 2
    norm.reset_running_stats()
    output = norm(ours)
    expected = torch.cat([F.batch_norm(v, exact.running_mean, exact.running_var, exact.weight, exact.bias, True) for v in theirs.chunk(2)])
    before = gradient.clone()
    output.backward(gradient)
    expected.backward(gradient.double())
    assert torch.equal(gradient, before)
    assert _error(output, expected) < ROUNDING[dtype]
    assert _error(ours.grad, theirs.grad) < ROUNDING[dtype]
    _assert_same_parameter_gradients_and_statistics(norm, exact)


def test_without_relu_the_gradient_of_a_shortcut_is_the_outputs():
    norm, x, shortcut = _norm(24), _images(6, 24, 5, torch.float32), _images(6, 24, 5, torch.float32).requires_grad_()
    gradient = _images(6, 24, 5, torch.float32)
    normalise_on_cpu(norm, x, shortcut, views=2, across_ranks=False, relu=False).output.backward(gradient)
    assert torch.equal(shortcut.grad, gradient)


def test_a_mean_a_thousand_times_the_deviation_does_not_make_the_variance_less_precise():
    norm, x = _norm(3), _images(8, 3, 12, torch.float32, mean=1000.0)
    norm_relu(norm, x)
    views = x.double().chunk(2)
    expected = 0.9 * (0.9 + 0.1 * views[0].var((0, 2, 3))) + 0.1 * views[1].var((0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-5, atol=0)


def test_the_result_is_bitwise_the_same_for_any_number_of_threads():
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        norm, x = _norm(64), _images(32, 64, 48, torch.bfloat16).requires_grad_()
        output = norm_relu(norm, x, _images(32, 64, 48, torch.bfloat16))
        output.backward(output.detach())
        return [output, x.grad, norm.weight.grad, norm.bias.grad, norm.running_var]

    before = torch.get_num_threads()
    try:
        assert all(map(torch.equal, run(1), run(3)))
    finally:
        torch.set_num_threads(before)


def test_a_pixel_far_from_all_others_leaves_the_variance_right_and_a_constant_channel_none():
    norm, x = _norm(2), _images(8, 2, 12, torch.float32)
    x[:, 1] = 700.0
    x[0, :, 0, 0] += 1000.0
    norm_relu(norm, x)
    views = x.double().chunk(2)
    expected = 0.9 * (0.9 + 0.1 * views[0].var((0, 2, 3))) + 0.1 * views[1].var((0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-5, atol=1e-9)
    assert views[1][:, 1].var() == 0
    assert norm_relu(_norm(2), x).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_passed_on(bad, dtype):
    x = _images(4, 5, 4, dtype)
    x[1, 2, 3, 3] = bad
    output = norm_relu(_norm(5), x)
    assert not output[:2, 2].isfinite().any()  # all of that view's channel
    assert output[2:].isfinite().all()
    assert output[:, [0, 1, 3, 4]].isfinite().all()
    shortcut = _images(4, 5, 4, dtype)
    shortcut[3, 0, 0, 0] = float("nan")
    assert norm_relu(_norm(5), _images(4, 5, 4, dtype), shortcut).isnan().sum() == 1


def test_it_is_one_operation_if_the_kernel_fits_and_torchs_operations_otherwise():
    x = _images(4, 8, 5, torch.float32)
    assert _used_kernel(_norm(8), x, x.clone())
    assert not _used_kernel(_norm(8).eval(), x)
    assert not _used_kernel(nn.BatchNorm2d(8), x)
    assert not _used_kernel(_norm(8), x.contiguous())
    assert not _used_kernel(_norm(8).double(), x.double())
    with _Operations() as operations:
        norm_relu(_norm(8), x, x.contiguous())
    assert {"fastbyol.norm_relu.default", "aten.add.Tensor", "aten.relu_.default"} <= set(operations.names)  # the norm alone
    encoder = convert_to_view_batchnorm(build_encoder("resnet50"), views=2).to(memory_format=torch.channels_last)
    with _Operations() as operations, torch.no_grad():
        encoder(_images(2, 3, 64, torch.float32))
    assert operations.names.count("fastbyol.norm_relu.default") == 53  # the four of the shortcuts without a ReLU
    assert "aten.native_batch_norm.default" not in operations.names


def test_torchs_operations_replace_it_in_a_compiled_graph_and_agree():
    torch.manual_seed(0)
    norm, x, shortcut = _norm(8), _images(4, 8, 5, torch.float32), _images(4, 8, 5, torch.float32)
    compiled = torch.compile(lambda x, z: norm_relu(norm, x, z), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, shortcut), norm_relu(norm, x, shortcut), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("call", "keeps"), [("keep_freed_memory()", True), ("return_large_blocks()", False), ("", False)])
def test_large_blocks_of_kept_memory_are_reused_without_page_faults(call, keeps):
    """Runs in a process of its own: eight blocks of 64 MiB cause 131,072 page faults of 4 KiB, or hardly any."""
    code = f"""
import resource, torch
from fastbyol.run.precision import keep_freed_memory, return_large_blocks
{call}
def faults_of_eight():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_eight()
print(faults_of_eight())
"""
    faults = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert (faults < 40_000) if keeps else (faults > 120_000)
