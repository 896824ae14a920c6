"""Pictures of test images with truth and prediction: label images in VOC's palette, boxes with class and score, depth with a colour bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.demo.scene_layouts import voc_palette
from fastbyol.evaluation.report_tasks import picture_file
from fastbyol.evaluation.tasks.job import Job

SAMPLES = 6
_INCHES = 2.2
Draw = Callable[[Any, Any], Any]
"""(axes, content of a cell) -> what a colour bar describes, or None."""


def sample_rows(num_test: int, *, ranks: int) -> list[int]:
    """Returns the test rows that are drawn: spread evenly over those that rank 0 tests."""
    mine = np.arange(num_test)[::ranks]
    return mine[np.unique(np.linspace(0, len(mine) - 1, SAMPLES).round().astype(int))].tolist()


def keep_predictions(job: Job, key: str, predictions: Mapping[int, NDArray[Any]]) -> None:
    """Saves the predictions of sample rows beside the part's scores, on the main rank, until the picture is drawn."""
    if job.process.is_main:
        path = job.part(key, ".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **{str(row): value for row, value in predictions.items()})  # type: ignore[arg-type]


def kept_predictions(job: Job, key: str) -> dict[int, NDArray[Any]]:
    """Returns the saved predictions by row; none if the file is not there."""
    try:
        with np.load(job.part(key, ".npz"), allow_pickle=False) as arrays:
            return {int(name): arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError):
        return {}


def picture_notes(
    job: Job, *, num_test: int, image_and_truth: Callable[[int], tuple[NDArray[np.uint8], Any]], draw: Draw, bar: str = ""
) -> list[str]:
    """Draws the first seed's predictions of sample rows, on the main rank, and returns a note that says where; see `draw_samples`."""
    if not job.process.is_main:
        return []
    path = draw_samples(
        job,
        rows=sample_rows(num_test, ranks=job.process.world_size),
        image_and_truth=image_and_truth,
        keys={subject.title: f"{subject.name} seed {job.seed}" for subject in job.subjects},
        draw=draw,
        bar=bar,
    )
    return [f"picture: {path}"] if path else []


def draw_samples(
    job: Job,
    *,
    rows: Sequence[int],
    image_and_truth: Callable[[int], tuple[NDArray[np.uint8], Any]],
    keys: Mapping[str, str],
    draw: Draw,
    bar: str = "",
) -> Path | None:
    """Draws the rows' images with the truth and the kept predictions of each encoder; returns the picture's path, None without predictions.

    image_and_truth: row -> pixels (H, W, 3), truth. keys: title of an encoder -> key of the part whose predictions are drawn. draw: draws
    (pixels, truth or prediction). bar: label of a colour bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    predictions = {title: kept_predictions(job, key) for title, key in keys.items()}
    predictions = {title: kept for title, kept in predictions.items() if kept}
    if not predictions:
        return None
    columns = ("image", "truth", *predictions)
    figure = Figure(figsize=(_INCHES * len(columns) + (0.8 if bar else 0), _INCHES * len(rows)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    described = None
    for line, row in zip(axes, rows, strict=True):
        pixels, truth = image_and_truth(int(row))
        line[0].imshow(pixels)
        described = draw(line[1], (pixels, truth)) or described
        for place, kept in zip(line[2:], predictions.values(), strict=True):
            if int(row) in kept:
                draw(place, (pixels, kept[int(row)]))
    for place, title in zip(axes[0], columns, strict=True):
        place.set_title(title, fontsize=9)
    for place in axes.flat:
        place.set_axis_off()
    if bar and described is not None:
        figure.colorbar(described, ax=axes, label=bar, shrink=0.6)
    path = picture_file(job.folder, task=job.task, digest=job.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_boxes(axes: Any, cell: Any, *, classes: tuple[str, ...], least_score: float = 0.3) -> None:
    """Draws the true boxes (score NaN), or the predicted ones with a score of at least `least_score`, with class and score."""
    from matplotlib.patches import Rectangle

    pixels, boxes = cell
    axes.imshow(pixels)
    palette = coloured(np.arange(256))
    for x_min, y_min, x_max, y_max, label, score in boxes.tolist():
        if score < least_score:
            continue
        colour = tuple(palette[int(label)] / 255)
        # Pixel centres are at whole numbers in matplotlib.
        axes.add_patch(Rectangle((x_min - 0.5, y_min - 0.5), x_max - x_min, y_max - y_min, fill=False, edgecolor=colour, linewidth=1.5))
        text = classes[int(label) - 1] + ("" if np.isnan(score) else f" {score:.2f}")
        # Above the box, but within the image.
        top = max(y_min - 1, 0.06 * len(pixels))
        axes.text(x_min, top, text, fontsize=6, color="white", backgroundcolor=(*colour, 0.8), verticalalignment="bottom", clip_on=True)


def coloured(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Returns label images (H, W) in VOC's palette, uint8 (H, W, 3)."""
    return voc_palette()[labels.astype(np.uint8)]
