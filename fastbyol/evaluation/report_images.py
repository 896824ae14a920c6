"""The report's sections that show images: nearest neighbours, clusters, a map, outliers and near-duplicates."""

from __future__ import annotations

import numpy as np
import torch

from fastbyol.evaluation import page
from fastbyol.evaluation.clusters import NEIGHBOUR, find_clusters, find_outliers, show_the_same, similar_pairs
from fastbyol.evaluation.feature_map import HEIGHT_PX, TILE_PX, WIDTH_PX, cells, coordinates, map_methods, map_picture
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.figures import picture
from fastbyol.evaluation.gallery import Neighbours, nearest_neighbours, thumbnails
from fastbyol.evaluation.subjects import FeatureBank
from fastbyol.host.quantities import count_text

QUERIES = 10
NEIGHBOURS = 7
CLUSTERS, CLUSTER_IMAGES = 10, 10
MAP_IMAGES = 4000
"""Images that compete for a place on the map."""
SEARCHED = 20_000
"""Images among which clusters, outliers and near-duplicates are looked for: a random choice, because all are compared with all."""
OUTLIERS, CANDIDATES, PAIRS = 20, 200, 12
GRID_COLUMNS, PAIRS_A_ROW = 10, 4
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
    text = f"Each row: a{' val' if val else 'n'} image and the {'training ' if val else ''}images with the nearest features, with their cosine similarity."
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
    train = _searched(bank)
    clusters = find_clusters(train.feature, count=CLUSTERS, shown=CLUSTER_IMAGES, seed=bank.config.seed)
    rows = []
    for number, cluster in enumerate(clusters, start=1):
        shown = train.rows(cluster.nearest)
        images = _cells(bank, shown.index, [_class(bank, value, otherwise="") for value in shown.label.tolist()])
        rows.append([page.escape(f"{number}: {cluster.size:,}"), *images])
    text = (
        f"{len(train.label):,} images in {len(clusters)} clusters (k-means on the features). Each row has the number of a cluster, how many images "
        "it holds, and the images nearest to its centre, nearest first."
    )
    return page.section("clusters", title="Clusters", parts=[page.paragraph(text), page.image_grid([], rows=rows, gaps=frozenset({1}))])


def map_section(bank: FeatureBank) -> str:
    """Returns the section with a map of the images: by PCA, and by UMAP if it is installed."""
    feature, seed = bank.of("byol").train.feature, bank.config.seed
    chosen = torch.randperm(len(feature), generator=torch.Generator().manual_seed(seed))[:MAP_IMAGES]
    if len(chosen) < 3:
        return ""
    parts = [page.paragraph("Each image is placed by its features; where several fall onto the same place, one is shown.")]
    for method in map_methods():
        place = cells(coordinates(feature[chosen], method=method, seed=seed), columns=WIDTH_PX // TILE_PX, rows=HEIGHT_PX // TILE_PX)
        shown = thumbnails(bank.splits.train.pick(chosen[torch.tensor(list(place))]), views=bank.config.views)
        parts += [page.paragraph(MAP_TITLES[method]), page.image(picture(map_picture(shown, place)), alt=f"map by {method}", kind="figure")]
    if len(parts) == 3:
        parts.append(page.paragraph("pip install 'fastbyol[umap]' adds a map by UMAP, which separates groups better.", kind="note"))
    return page.section("map", title="Map", parts=parts)


def odd_images_section(bank: FeatureBank) -> str:
    """Returns the section with outliers and near-duplicates."""
    train = _searched(bank)
    if len(train.label) < 3:
        return ""
    outlier, distance = find_outliers(train.feature, count=OUTLIERS, device=bank.device)
    images = _cells(bank, train.index[outlier], [f"{value:.1f}" for value in distance.tolist()])
    text = f"Of {len(train.label):,} images, those farthest from their {NEIGHBOUR}th neighbour (standardised features): damaged, rare, or out of place."
    parts = [page.paragraph(text), page.image_grid([], rows=_in_rows(images, GRID_COLUMNS))]
    pairs = train.index[similar_pairs(train.feature, at_most=CANDIDATES, device=bank.device)].view(-1, 2)
    if len(pairs):
        pairs = pairs[show_the_same(*(bank.splits.train.pick(side) for side in pairs.T))]
    more = f", {PAIRS} of them:" if len(pairs) > PAIRS else ":" if len(pairs) else "."
    said = f"{count_text(len(pairs), 'pair')} {'shows' if len(pairs) == 1 else 'show'} the same picture{more}"
    parts.append(page.paragraph(f"Near-duplicates, among the {CANDIDATES} pairs with the most similar features: {said}"))
    rows = pairs[:PAIRS].flatten()
    if len(rows):
        cells = _cells(bank, rows, [bank.splits.train.name(row) for row in rows.tolist()])
        gaps = frozenset(range(0, 2 * PAIRS_A_ROW, 2))
        parts.append(page.image_grid([], rows=_in_rows(cells, 2 * PAIRS_A_ROW), gaps=gaps))
    return page.section("odd", title="Outliers and near-duplicates", parts=parts)


def _searched(bank: FeatureBank) -> Features:
    """Returns the trained encoder's features of at most SEARCHED random train images."""
    train = bank.of("byol").train
    return train.rows(torch.randperm(len(train.label), generator=torch.Generator().manual_seed(bank.config.seed))[:SEARCHED].sort().values)


def _in_rows(cells: list[str], columns: int) -> list[list[str]]:
    return [cells[first : first + columns] for first in range(0, len(cells), columns)]


def _cells(bank: FeatureBank, rows: torch.Tensor, captions: list[str]) -> list[str]:
    """Returns an image with a caption for each row of the train images."""
    shown = thumbnails(bank.splits.train.pick(rows), views=bank.config.views)
    return [
        page.image(picture(pixels), alt=bank.splits.train.name(row)) + page.escape(caption)
        for pixels, row, caption in zip(shown, rows.tolist(), captions, strict=True)
    ]
