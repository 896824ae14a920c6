"""The report's sections that show images: nearest neighbours, clusters, a map, outliers and near-duplicates."""

from __future__ import annotations

import numpy as np
import torch

from fastbyol.evaluation import page
from fastbyol.evaluation.clusters import DUPLICATE_COSINE, NEIGHBOUR, find_clusters, find_odd_images
from fastbyol.evaluation.feature_map import HEIGHT_PX, TILE_PX, WIDTH_PX, cells, coordinates, map_methods, map_picture
from fastbyol.evaluation.figures import picture
from fastbyol.evaluation.gallery import Neighbours, nearest_neighbours, thumbnails
from fastbyol.evaluation.subjects import FeatureBank

QUERIES = 10
NEIGHBOURS = 7
CLUSTERS, CLUSTER_IMAGES = 10, 10
MAP_IMAGES = 4000
"""Images that compete for a place on the map."""
OUTLIERS, PAIRS = 20, 10
GRID_COLUMNS = 10
MAP_TITLES = {"pca": "The first two principal components.", "umap": "UMAP."}


def neighbours_section(bank: FeatureBank) -> str:
    """Returns the section with the images nearest to some val images, or to some of the images themselves if there is no val."""
    features = bank.of("byol")
    val = bank.splits.val
    asked, name = (bank.splits.train, "image") if val is None else (val, "val image")
    found = nearest_neighbours(features.train, features.val, queries=min(QUERIES, asked.num_samples), k=NEIGHBOURS, seed=bank.config.seed)
    views = bank.config.views
    queries = thumbnails(asked.pick(found.query), views=views)
    neighbours = thumbnails(bank.splits.train.pick(found.neighbour.flatten()), views=views)
    neighbours = neighbours.reshape(*found.neighbour.shape, *neighbours.shape[1:])
    rows = [_neighbour_cells(bank, found, row, queries[row], neighbours[row]) for row in range(len(found.query))]
    text = f"A{' val' if val else 'n'} image and the {'training ' if val else ''}images with the nearest features, with their cosine."
    labelled = bool((features.train.label >= 0).any())
    if labelled:
        text += " Green frame: same class; red frame: another class."
    header = ["class" if labelled else "name", name, *(f"neighbour {i + 1}" for i in range(neighbours.shape[1]))]
    parts = [page.paragraph(text), page.image_grid(header, rows=rows, gaps=frozenset({2}))]
    return page.section("neighbours", title="Nearest neighbours", parts=parts)


def _neighbour_cells(bank: FeatureBank, found: Neighbours, row: int, query: np.ndarray, neighbours: np.ndarray) -> list[str]:
    features, splits = bank.of("byol"), bank.splits
    asked, label_of = (splits.train, features.train.label) if splits.val is None else (splits.val, features.val.label)
    number = int(found.query[row])
    label, name = int(label_of[number]), asked.name(number)
    cells = [page.escape(_class(bank, label, otherwise=name)), page.image(picture(query), alt=f"{name}: {_class(bank, label)}")]
    for pixels, position, similarity in zip(neighbours, found.neighbour[row].tolist(), found.similarity[row].tolist(), strict=True):
        other = int(features.train.label[position])
        alt = f"{splits.train.name(position)}: {_class(bank, other)}, cosine {similarity:.3f}"
        kind = "" if min(label, other) < 0 else "hit" if other == label else "miss"
        cells.append(page.image(picture(pixels), alt=alt, kind=kind) + f"{similarity:.2f}")
    return cells


def _class(bank: FeatureBank, label: int, *, otherwise: str = "no label") -> str:
    return bank.splits.class_names[label] if label >= 0 else otherwise


def clusters_section(bank: FeatureBank) -> str:
    """Returns the section with the images nearest to the centre of each cluster of k-means."""
    train = bank.of("byol").train
    clusters = find_clusters(train.feature, count=CLUSTERS, shown=CLUSTER_IMAGES, seed=bank.config.seed)
    rows = []
    for number, cluster in enumerate(clusters, start=1):
        label = train.label[cluster.nearest]
        images = _cells(bank, cluster.nearest, [_class(bank, value, otherwise="") for value in label.tolist()])
        rows.append([page.escape(f"{number}: {cluster.size:,} images"), *images])
    text = f"The images in {len(clusters)} groups (k-means on the features); of each group those nearest to its centre, nearest first."
    return page.section("clusters", title="Clusters", parts=[page.paragraph(text), page.image_grid([], rows=rows, gaps=frozenset({1}))])


def map_section(bank: FeatureBank) -> str:
    """Returns the section with a map of the images: by PCA, and by UMAP if it is installed."""
    feature, seed = bank.of("byol").train.feature, bank.config.seed
    chosen = torch.randperm(len(feature), generator=torch.Generator().manual_seed(seed))[:MAP_IMAGES]
    if len(chosen) < 3:
        return ""
    parts = [page.paragraph("Each image stands where its features put it; of those that fall onto the same place one is shown.")]
    for method in map_methods():
        place = cells(coordinates(feature[chosen], method=method, seed=seed), columns=WIDTH_PX // TILE_PX, rows=HEIGHT_PX // TILE_PX)
        shown = thumbnails(bank.splits.train.pick(chosen[torch.tensor(list(place))]), views=bank.config.views)
        parts += [page.paragraph(MAP_TITLES[method]), page.image(picture(map_picture(shown, place)), alt=f"map by {method}", kind="figure")]
    if len(parts) == 3:
        parts.append(page.paragraph("pip install 'fastbyol[umap]' adds a map by UMAP, which separates groups better.", kind="note"))
    return page.section("map", title="Map", parts=parts)


def odd_images_section(bank: FeatureBank) -> str:
    """Returns the section with outliers and near-duplicates."""
    feature = bank.of("byol").train.feature
    if len(feature) < 3:
        return ""
    found = find_odd_images(feature, outliers=OUTLIERS, device=bank.device)
    captions = [f"{value:.2f}" for value in found.distance.tolist()]
    images = _cells(bank, found.outlier, captions)
    parts = [
        page.paragraph(
            f"The images farthest from their {NEIGHBOUR}th neighbour (1 - cosine of the centred features): damaged, rare, or alien."
        ),
        page.image_grid([], rows=[images[first : first + GRID_COLUMNS] for first in range(0, len(images), GRID_COLUMNS)]),
    ]
    num = len(found.pair)
    said = f"{num:,} pairs have a cosine of {DUPLICATE_COSINE} or more" + (
        f"; the {PAIRS} most similar:" if num > PAIRS else ":" if num else "."
    )
    parts.append(page.paragraph(f"Near-duplicates: {said}"))
    if num:
        pairs = found.pair[:PAIRS]
        names = [bank.splits.train.name(row) for row in pairs.flatten().tolist()]
        images = _cells(bank, pairs.flatten(), names)
        rows = [[f"{cosine:.4f}", *images[2 * i : 2 * i + 2]] for i, cosine in enumerate(found.cosine[:PAIRS].tolist())]
        parts.append(page.image_grid(["cosine", "", ""], rows=rows))
    return page.section("odd", title="Outliers and near-duplicates", parts=parts)


def _cells(bank: FeatureBank, rows: torch.Tensor, captions: list[str]) -> list[str]:
    """Returns an image with a caption for each row of the train images."""
    shown = thumbnails(bank.splits.train.pick(rows), views=bank.config.views)
    return [
        page.image(picture(pixels), alt=bank.splits.train.name(row)) + page.escape(caption)
        for pixels, row, caption in zip(shown, rows.tolist(), captions, strict=True)
    ]
