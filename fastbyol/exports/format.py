"""What a format of an export is, and the encoder that is being exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.config.schema import ModelConfig, TrainConfig

Facts = Mapping[str, Any]
"""What the card says, as plain values for JSON; see `card.py`."""
Features = Callable[[Tensor], Tensor]
"""Maps normalised images (N, 3, S, S) to features (N, D), whatever program computes them."""


@dataclass(frozen=True)
class Subject:
    """The encoder that is exported, in eval mode on the CPU, and its run's config.

    fold: join each batch norm to the convolution before it: auto, yes or no. made: intermediate results of the formats, by name, because two
    of them start from the same program.
    """

    encoder: nn.Module
    config: TrainConfig
    fold: str = "auto"
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def feature_dim(self) -> int:
        return int(self.encoder.feature_dim)  # type: ignore[arg-type]

    def weights(self) -> dict[str, Tensor]:
        """Returns the encoder's tensors by name, each with memory of its own."""
        return {name: tensor.detach().contiguous().clone() for name, tensor in self.encoder.state_dict().items()}

    def example(self) -> Tensor:
        """Returns a batch that tracing may take the shapes of."""
        # Two images: a batch of one would be taken for a constant.
        return torch.zeros(2, 3, self.config.views.size_px, self.config.views.size_px)


@dataclass(frozen=True)
class Format:
    """A format that encoders are exported to, a value of FORMATS in its module.

    file: its usual name. suffixes: that it may have; none for a folder. needs: packages to write it and to load it back, by the name that
    they are imported by. checked_in: the program that computes features of what was written. refusal: returns why it cannot hold such an
    encoder, '' if it can. convert: returns what `save` writes, as often as asked, with the facts of the card. read: returns the features of
    what was written. lines: Python that loads it. limit: largest difference of a feature, relative to the largest feature or 1. folds: batch
    norm can be folded. not_loaded: says instead of 'loaded back' why the program that the format is for was not asked.
    """

    file: str
    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    checked_in: str
    refusal: Callable[[ModelConfig], str]
    convert: Callable[[Subject], Any]
    save: Callable[[Any, Path, Facts, Subject], None]
    read: Callable[[Path, Subject], Features]
    lines: Callable[[str, Subject], Sequence[str]]
    limit: float = 1e-5
    folds: bool = False
    not_loaded: str = ""

    @property
    def is_folder(self) -> bool:
        return not self.suffixes


def no_refusal(model: ModelConfig) -> str:
    """Returns '': the format can hold any encoder."""
    return ""


def refusal_of_resnets(model: ModelConfig, names: Sequence[str], *, program: str) -> str:
    """Returns why a program that has torchvision's ResNets of these names cannot hold the encoder; '' if it can."""
    if model.encoder.startswith("timm/"):
        return f"{program} does not have timm's {model.encoder.removeprefix('timm/')}"
    if model.encoder not in names:
        return f"{program} has no {model.encoder}, only {', '.join(names)}"
    if model.width != 1:
        return f"{program}'s {model.encoder} has no model.width {model.width}"
    if model.stem != "imagenet":
        return f"{program}'s {model.encoder} begins with a 7x7 convolution and a max-pool, this one has model.stem {model.stem}"
    if model.padding != "symmetric":
        return f"{program}'s {model.encoder} pads as PyTorch does, so model.padding {model.padding} would give other features there"
    return ""
