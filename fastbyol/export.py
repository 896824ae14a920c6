"""Loads a trained encoder for use elsewhere, together with the preprocessing of its images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbyol.augment.parameters import centre_crop_parameters
from fastbyol.augment.view_kernel import ViewKernel
from fastbyol.byol import build_byol
from fastbyol.config.errors import UserError
from fastbyol.config.views import ViewPair
from fastbyol.data.formats.pillow_decoding import UndecodableImage, as_rgb, decode_with_pillow
from fastbyol.models import encoder_from
from fastbyol.models.view_batchnorm import convert_to_batchnorm
from fastbyol.run.checkpoint import RunState
from fastbyol.run.foreign_weights import Matching, classifiers_of, load_run_or_weights, match_names
from fastbyol.run.initial_weights import load_matching

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("fastbyol")
CROP = "centred square of 7/8 of the short side"


@dataclass(frozen=True)
class Preprocessing:
    """Turns an image into an encoder's input, with the same pixels as the evaluation loader: `CROP`, resized and normalised.

    Of `views` only size_px, interpolation, antialias, mean and std are used.
    """

    views: ViewPair

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """Returns (1, 3, S, S) float32 of a Pillow image of any mode, or of an image file. Raises UserError if the file does not decode."""
        if isinstance(image, str | Path):
            try:
                pixels = decode_with_pillow(Path(image).read_bytes())
            except (UndecodableImage, OSError) as error:
                raise UserError(f"{image}: cannot be read as an image ({error})") from error
        else:
            pixels = np.asarray(as_rgb(image))
        height, width = pixels.shape[:2]
        parameters = centre_crop_parameters(height=np.array([height]), width=np.array([width]))
        out = np.empty((1, self.views.size_px, self.views.size_px, 3), dtype=np.float32)
        _kernel(self.views).render(np.ascontiguousarray(pixels), parameters[0], out)
        return torch.from_numpy(out).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _kernel(views: ViewPair) -> ViewKernel:
    # Not a field of Preprocessing: the kernel's scratch memory is thread-local, and an encoder must stay copyable and picklable.
    return ViewKernel.of(views)


def load_encoder(path_or_run: str | Path, *, changes: Mapping[str, Any] | None = None) -> nn.Module:
    """Returns the online encoder of a run folder or checkpoint file, or the ResNet in another program's weights file, in eval mode on the
    CPU.

    It maps (N, 3, H, W) normalised images to (N, feature_dim). It is the online network's encoder, not the target's, as in the
    official evaluation. Parameter names are torchvision's. Its attribute `preprocess` is the `Preprocessing` of its images:
    `encoder(encoder.preprocess(image))` is the feature of a Pillow image.

    Args:
        path_or_run: a run or checkpoint of ours, or an export; or a .pt, .pth, .ckpt, .safetensors or .npz file of torchvision, timm,
            solo-learn, lightly, VISSL, mmselfsup or DeepMind, which is taken to see ImageNet's 224 px.
        changes: for such a file, what it cannot tell, for example {"views.size_px": 32, "model.stem": "small2"}.
    """
    return encoder_of(load_run_or_weights(path_or_run, changes=changes))


def encoder_of(run: RunState, *, announce: Callable[[str], None] = log.info) -> nn.Module:
    """Returns the encoder of a loaded run, as `load_encoder` does. Raises UserError if its weights do not match its config.

    announce: called with a line that says what was taken of another program's weights.
    """
    return networks_of(run, announce=announce)[0]


def networks_of(run: RunState, *, announce: Callable[[str], None] = log.info) -> tuple[nn.Module, nn.Module | None]:
    """Returns encoder and projector of a loaded run, both in eval mode; no projector of another program's weights."""
    projector = None
    if "encoder" in run.state:
        encoder, found = match_encoder(run)
        load_matching(encoder, found.weights, source=run.state["source"])
        size = f"images of {run.config.views.size_px} px"
        announce(f"{run.state['source']}: {run.config.model.encoder}, {size}, {found.summary()}; every key: python -m fastbyol weights")
    else:
        bias = run.state["byol"].get("probe.bias")
        byol = build_byol(run.config.model, num_classes=len(bias) if bias is not None and bias.ndim else 1)
        load_matching(byol, run.state["byol"], source=f"the checkpoint after step {run.step} of {run.folder}")
        encoder, projector = byol.online.encoder, convert_to_batchnorm(byol.online.projector).eval()
    encoder = convert_to_batchnorm(encoder).eval()
    encoder.preprocess = Preprocessing(run.config.views)  # type: ignore[assignment]  # nn.Module's stubs know tensors and modules only
    return encoder, projector


def match_encoder(run: RunState) -> tuple[nn.Module, Matching]:
    """Returns the encoder for another program's weights, freshly initialised, and what of the file belongs to it."""
    encoder = encoder_from(run.config.model)
    return encoder, match_names(run.state["encoder"], encoder.state_dict(), source=run.state["source"], classifiers=classifiers_of(encoder))
