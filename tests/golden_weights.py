"""Official (Haiku) parameters under our names: HWIO convolutions to OIHW, (in, out) linears to (out, in), batch norms flat."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


def torch_layout(array: np.ndarray) -> Tensor:
    """A Haiku weight, scale or offset in PyTorch's layout."""
    array = np.asarray(array)
    if array.ndim == 4 and array.shape[:3] != (1, 1, 1):
        return torch.tensor(array.transpose(3, 2, 0, 1).copy())
    if array.ndim == 4 or (array.ndim == 2 and array.shape[0] == 1):
        return torch.tensor(array.reshape(-1).copy())
    return torch.tensor(array.T.copy()) if array.ndim == 2 else torch.tensor(array.copy())


def encoder_name(haiku: str) -> str:
    """'net/~/block_group_0/~/block_1/~/conv_2|w' -> 'layer1.1.conv3.weight'."""
    module, leaf = haiku.split("|")
    part = {"w": "weight", "scale": "weight", "offset": "bias"}[leaf]
    if module.endswith("initial_conv"):
        return f"conv1.{part}"
    if module.endswith("initial_batchnorm"):
        return f"bn1.{part}"
    match = re.search(r"block_group_(\d)/~/block_(\d+)/~/(\w+)$", module)
    assert match, haiku
    group, block, layer = int(match[1]), int(match[2]), match[3]
    ours = {"shortcut_conv": "downsample.0", "shortcut_batchnorm": "downsample.1"}.get(layer)
    if ours is None:
        kind, index = layer.rsplit("_", 1)
        ours = {"conv": "conv", "batchnorm": "bn"}[kind] + str(int(index) + 1)
    return f"layer{group + 1}.{block}.{ours}.{part}"


def load_parameters(module: nn.Module, parameters: dict[str, Tensor]) -> None:
    """Sets every parameter by name; none may be left over on either side."""
    own = dict(module.named_parameters())
    assert own.keys() == parameters.keys()
    with torch.no_grad():
        for name, value in parameters.items():
            own[name].copy_(value.reshape(own[name].shape))


def regenerated(golden: np.lib.npyio.NpzFile) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of a golden file that stores their seed only (rule in the golden README of the project's research)."""
    for i, (name, shape_text) in enumerate(zip(golden["names"], golden["param_shapes"], strict=True)):
        shape = tuple(int(n) for n in re.findall(r"\d+", str(shape_text)))
        z = np.random.RandomState([int(golden["seed"]), i]).standard_normal(shape)
        leaf = str(name).rsplit("|", 1)[1]
        value = {"w": z * np.sqrt(2 / np.prod(shape[:-1])), "scale": 0.8 + 0.1 * z}.get(leaf, 0.1 * z)
        yield str(name), value.astype(np.float32)


class DebiasedStatistics:
    """Haiku's running statistics of each batch norm: biased variance, decay 0.9, divided by 1 - 0.9^n. torch's differ in both."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.sums = {m: [0.0, 0.0] for m in self.norms}
        self.calls = 0
        for norm in self.norms:
            norm.register_forward_pre_hook(self._observe)

    def _observe(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if norm.training:
            x = inputs[0].detach()
            axes = [0, *range(2, x.ndim)]
            for i, now in enumerate((x.mean(axes), x.var(axes, unbiased=False))):
                self.sums[norm][i] = 0.9 * self.sums[norm][i] + 0.1 * now

    def install(self, *, calls: int) -> None:
        """Writes them into the modules' buffers after `calls` training forwards."""
        for norm in self.norms:
            mean, variance = (s / (1 - 0.9**calls) for s in self.sums[norm])
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
