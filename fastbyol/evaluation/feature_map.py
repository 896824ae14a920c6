"""A map of images in two dimensions: each thumbnail stands where its features put it."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image

from fastbyol.evaluation.clusters import centred

WIDTH_PX, HEIGHT_PX, TILE_PX = 1300, 850, 34
PAPER = (255, 255, 255)


def coordinates(feature: torch.Tensor, *, method: str, seed: int = 0) -> np.ndarray:
    """Returns a place (N, 2) for each of the features (N, D). method: 'pca', or 'umap', which must be installed."""
    unit = centred(feature).numpy()
    if method == "umap":
        from umap import UMAP  # type: ignore[import-not-found]  # an extra

        # The spectral start needs more than three images for its eigenvectors. n_jobs: with a seed UMAP uses one job and warns of any other number.
        start = "spectral" if len(unit) > 3 else "random"
        umap = UMAP(n_neighbors=min(15, len(unit) - 1), metric="cosine", init=start, random_state=seed, n_jobs=1)
        return np.asarray(umap.fit_transform(unit))
    from sklearn.decomposition import PCA

    return PCA(n_components=2, random_state=seed).fit_transform(unit)


def map_methods() -> list[str]:
    """Returns the methods that can be used here: PCA always, UMAP if it is installed."""
    return ["pca", *(["umap"] if find_spec("umap") else [])]


def cells(place: np.ndarray, *, columns: int, rows: int) -> dict[int, tuple[int, int]]:
    """Returns the grid cell (column, row) of each image that is shown: the first of those that fall into the same cell.

    Places are scaled by their 1st and 99th percentile, so that a few outliers do not squeeze all others together.
    """
    low, high = np.percentile(place, [1, 99], axis=0)
    share = np.clip((place - low) / np.maximum(high - low, 1e-9), 0, 1)
    grid = np.round(share * (columns - 1, rows - 1)).astype(np.int64)
    grid[:, 1] = rows - 1 - grid[:, 1]  # upwards, as in a plot
    first: dict[tuple[int, int], int] = {}
    for number, (x, y) in enumerate(grid.tolist()):
        first.setdefault((x, y), number)
    return {number: cell for cell, number in first.items()}


def map_picture(thumbnails: np.ndarray, place: dict[int, tuple[int, int]]) -> np.ndarray:
    """Returns the map (H, W, 3) uint8. thumbnails: (N, S, S, 3) uint8, in the order of `place`, image -> cell."""
    sheet = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), PAPER)
    for pixels, (x, y) in zip(thumbnails, place.values(), strict=True):
        sheet.paste(Image.fromarray(pixels).resize((TILE_PX - 2, TILE_PX - 2), Image.Resampling.LANCZOS), (x * TILE_PX, y * TILE_PX))
    return np.asarray(sheet)
