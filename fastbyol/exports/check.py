"""Checks an export: compares its features, from the program that it is for, with the encoder's, on real images where there are any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data.build import build_image_loader
from fastbyol.exports.card import source_name
from fastbyol.exports.format import Features, Format, Subject
from fastbyol.run.checkpoint import RunState

NUM_IMAGES = 8


@dataclass(frozen=True)
class CheckImages:
    """Images for the check, normalised, (N, 3, S, S), and what they are."""

    images: Tensor
    title: str


def check_images(run: RunState, data: str | None) -> CheckImages:
    """Returns images spread over the data, or over the run's own training data; if those cannot be read, generated ones, which `title` says.

    Raises UserError if `data` is given and cannot be read.
    """
    views = run.config.views
    if data is not None:
        return _of(DataConfig(train=data), views)
    if not run.config.data.train:
        return CheckImages(generated_images(views), f"{NUM_IMAGES} generated images; --data gives real ones")
    try:
        return _of(replace(run.config.data, val="", workers=0), views)
    except (UserError, OSError):
        return CheckImages(
            generated_images(views), f"{NUM_IMAGES} generated images, because the run's own are not here; --data gives others"
        )


def _of(data: DataConfig, views: ViewPair) -> CheckImages:
    with build_image_loader(data, views=views, batch=NUM_IMAGES, workers=1, option="--data", replace_damaged=True) as loader:
        count = min(NUM_IMAGES, loader.num_samples)
        index = np.linspace(0, loader.num_samples - 1, count).astype(np.int64)
        images = torch.cat([batch.image for batch in loader.batches_of(index)])
    return CheckImages(images.contiguous(), f"{count} images of {source_name(data.train)}")


def generated_images(views: ViewPair) -> Tensor:
    """Returns smooth random colours, normalised as images are."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(NUM_IMAGES, 3, 5, 5, generator=generator)
    pixels = F.interpolate(coarse, size=(views.size_px, views.size_px), mode="bicubic").clamp(0, 1)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (views.mean, views.std))
    return (pixels - mean) / std


def checked(found: Format, features: Features, subject: Subject, given: CheckImages, *, name: str) -> dict[str, object]:
    """Returns the largest difference between the features of what was written and the encoder's, and the card's sentence on it.

    Raises UserError if it is above the format's limit, relative to the largest feature or 1.
    """
    with torch.inference_mode():
        # One image, then the others: a batch of another size must work too.
        parts = [part for part in given.images.split([1, len(given.images) - 1]) if len(part)]
        ours, theirs = (torch.cat([each(part).float() for part in parts]) for each in (subject.encoder, features))
    largest = max(1.0, ours.abs().max().item())
    error = (theirs - ours).abs().max().item() if theirs.shape == ours.shape else float("inf")
    if not error <= found.limit * largest:  # NaN is refused too
        raise UserError(
            f"--to {name}: the features of the exported encoder in {found.checked_in} differ from its own by {error:.2g}, more than "
            f"{found.limit * largest:.2g}; nothing was written. Please report this with the versions of torch and {found.checked_in}"
        )
    program = _with_version(found.checked_in)
    how = found.not_loaded or f"Loaded back with {program}"
    words = f"{how}: the largest difference in a feature is {error:.2g}, and the largest feature {largest:.3g} ({given.title})."
    return {"program": program, "images": given.title, "largest_difference": error, "largest_feature": largest, "words": words}


def _with_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
