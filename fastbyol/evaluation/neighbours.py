"""The nearest images of one image by its features, as a picture and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fastbyol.config.console import printable
from fastbyol.config.errors import UserError, require_at_least
from fastbyol.config.plain import nearest_name
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data.build import build_image_loader
from fastbyol.evaluation.embedding import weights_digest
from fastbyol.evaluation.feature_file import FeatureFile, valid_text
from fastbyol.evaluation.gallery import display_pixels
from fastbyol.evaluation.knn import nearest
from fastbyol.export import encoder_of
from fastbyol.host.durable_files import durable_file, write_durably
from fastbyol.run.foreign_weights import load_run_or_weights

TILE_PX, MARGIN_PX, LINE_PX, COLUMNS = 144, 10, 14, 7
INK, PAPER, QUERY_INK = "black", "white", "#1f5fa8"


class Neighbour(NamedTuple):
    """An image of the features' data. row: its row in the file. cosine: similarity to the query, in [-1, 1]. label: class name, '' for none."""

    row: int
    name: str
    cosine: float
    label: str


def write_neighbours(
    features: str | Path, query: str, *, out: str | Path, k: int = 20, checkpoint: str | Path | None = None, data: str | Path | None = None
) -> list[Neighbour]:
    """Writes a PNG of the query and its k nearest images, and a JSON of the same name beside it; returns the neighbours, nearest first.

    Args:
        features: file that `embed` wrote.
        query: name of a row of it (never its own neighbour), or an image file, which is embedded with the checkpoint.
        out: PNG file to write or replace.
        k: number of neighbours; fewer if the file has fewer images.
        checkpoint: the encoder of the features, where it is no longer at the place that they name.
        data: the images of the features, likewise.

    Raises:
        UserError: not a file of features, no such query, or checkpoint or data are not those of the features.
    """
    out = Path(out)
    require_at_least("--k", k, 1)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: must end in .png")
    file = FeatureFile(features)
    facts = file.facts
    row = _row(file, query)
    views = ViewPair(
        size_px=facts.size_px,
        interpolation=facts.interpolation,
        antialias=facts.antialias,
        mean=_triple(facts.mean),
        std=_triple(facts.std),
    )
    if row is None:
        image, feature = _embedded(file, query, checkpoint=checkpoint)
    elif checkpoint is not None:
        raise UserError(f"--checkpoint {checkpoint}: has no effect where --query names a row of the features; leave it out")
    else:
        image, feature = None, _feature(file, row)
    found = _nearest(file, feature, k=k, without=row)
    try:
        opened = build_image_loader(DataConfig(train=str(data or facts.data), labels=facts.labels), views=views, batch=1, option="--data")
    except UserError as error:
        if data:
            raise
        raise UserError(
            f"{file.path}: its images cannot be opened ({error}); if they have moved, say where they are with --data"
        ) from error
    with opened as loader:
        if loader.fingerprint() != facts.fingerprint:
            if data:
                raise UserError(
                    f"--data {data}: does not hold the images of {file.path}; give the folder that was embedded, or embed this one"
                )
            raise UserError(
                f"{facts.data}: holds other images than when {file.path} was made; embed again, or give --data if they have moved"
            )
        index = [facts.index_of(each) for each in ([] if row is None else [row]) + [neighbour.row for neighbour in found]]
        if max(index) >= loader.num_samples:
            raise UserError(f"{file.path}: its facts name {len(facts.damaged):,} damaged images, more than its data can have; embed again")
        images = loader.pick(index).image
    pixels = display_pixels(images if image is None else torch.cat([image, images]), views=views)
    query_label = "" if row is None else _label(file, row)
    title = f"{file.path.name}: {facts.encoder}" + (f", step {facts.step:,}" if facts.step else "")
    try:
        with durable_file(out) as png:
            _sheet(pixels, found, query=query, label=query_label, title=title).save(png, "png")
        write_durably(out.with_suffix(".json"), json.dumps(_record(file, query, query_label, found), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); choose another file") from error
    return found


def _row(file: FeatureFile, query: str) -> int | None:
    """Returns the row that the query names, or None if it is an image file. Raises UserError if it is neither."""
    name = valid_text(query)
    rows = [row for row, each in enumerate(file.names) if each == name]
    if len(rows) > 1:
        raise UserError(f"--query {query}: {len(rows)} rows of {file.path} have this name; give an image file instead")
    if rows:
        return rows[0]
    if Path(query).is_file():
        return None
    raise UserError(f"--query {query}: is neither an image file nor the name of a row in {file.path}{nearest_name(name, file.names)}")


def _feature(file: FeatureFile, row: int) -> torch.Tensor:
    first = 0
    for block in file.blocks():
        if row < first + len(block):
            return torch.from_numpy(np.array(block[row - first], dtype=np.float32))
        first += len(block)
    raise AssertionError("blocks() refuses a file with too few rows")


def _embedded(file: FeatureFile, query: str, *, checkpoint: str | Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the query's normalised pixels (1, 3, S, S) and its feature (D,)."""
    facts = file.facts
    place = str(checkpoint or facts.checkpoint)
    if not Path(place).exists():
        raise UserError(f"checkpoint {place}: the encoder of {file.path} is no longer there; say where it is with --checkpoint")
    run = load_run_or_weights(place, changes=facts.changes)
    encoder = encoder_of(run)
    if weights_digest(encoder) != facts.weights:
        raise UserError(
            f"checkpoint {place}: is another encoder (step {run.step}) than the one of {file.path} (step {facts.step}); give its file "
            "with --checkpoint, or embed again"
        )
    image = encoder.preprocess(query)  # type: ignore[operator]
    with torch.inference_mode():
        return image, encoder(image)[0].clone()


def _nearest(file: FeatureFile, feature: torch.Tensor, *, k: int, without: int | None) -> list[Neighbour]:
    """Returns the k rows of largest cosine, best first, read in blocks: the features may be larger than memory."""
    similarity, position = torch.empty(0), torch.empty(0, dtype=torch.int64)
    first = 0
    for block in file.blocks():
        rows = torch.from_numpy(np.array(block, dtype=np.float32))
        if not bool(torch.isfinite(rows).all()):
            raise UserError(f"{file.path}: holds features that are not finite; make it again with python -m fastbyol embed")
        near, at = nearest(rows, feature[None], k=min(k + 1, len(rows)))
        similarity, position = torch.cat([similarity, near[0]]), torch.cat([position, at[0] + first])
        first += len(rows)
    order = similarity.argsort(descending=True, stable=True)
    best = [(int(position[i]), float(similarity[i])) for i in order.tolist() if int(position[i]) != without][:k]
    if not best:
        raise UserError(f"{file.path}: holds no other image than the query; there is no neighbour to show")
    return [Neighbour(row, file.names[row], round(cosine, 6), _label(file, row)) for row, cosine in best]


def _label(file: FeatureFile, row: int) -> str:
    label, names = int(file.labels[row]), file.facts.class_names
    if label < 0:
        return ""
    return names[label] if label < len(names) else str(label)


def _triple(values: list[Any]) -> tuple[float, float, float]:
    if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise UserError(f"mean or std of the features is {values}: must be three numbers")
    return float(values[0]), float(values[1]), float(values[2])


def _record(file: FeatureFile, query: str, label: str, found: list[Neighbour]) -> dict[str, Any]:
    facts = file.facts
    return {
        "query": valid_text(query),
        "label": label,
        "features": str(file.path),
        "checkpoint": facts.checkpoint,
        "step": facts.step,
        "data": facts.data,
        "neighbours": [neighbour._asdict() for neighbour in found],
    }


def _sheet(pixels: NDArray[np.uint8], found: list[Neighbour], *, query: str, label: str, title: str) -> Image.Image:
    """Draws the query above its neighbours, COLUMNS in a row, each with cosine, label and name below."""
    font = ImageFont.load_default()
    columns = min(COLUMNS, max(3, len(found)))
    column, row = TILE_PX + MARGIN_PX, TILE_PX + 3 * LINE_PX + MARGIN_PX
    num_rows = -(-len(found) // columns)
    top = 2 * MARGIN_PX + LINE_PX
    sheet = Image.new("RGB", (MARGIN_PX + columns * column, top + (1 + num_rows) * row), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PX, MARGIN_PX), _fitted(draw, title, font, sheet.width - 2 * MARGIN_PX), fill=INK, font=font)
    captions = [["query", label, query], *([f"{each.cosine:.3f}", each.label, each.name] for each in found)]
    for place, (image, lines) in enumerate(zip(pixels, captions, strict=True)):
        down, across = (0, 0) if not place else (1 + (place - 1) // columns, (place - 1) % columns)
        x, y = MARGIN_PX + across * column, top + down * row
        # Small images are enlarged without smoothing, so that what the encoder saw stays visible.
        how = Image.Resampling.NEAREST if image.shape[0] <= TILE_PX else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(image).resize((TILE_PX, TILE_PX), how), (x, y))
        if not place:
            draw.rectangle((x - 3, y - 3, x + TILE_PX + 2, y + TILE_PX + 2), outline=QUERY_INK, width=3)
        for number, line in enumerate(line for line in lines if line):
            ink = QUERY_INK if not place else INK
            draw.text((x, y + TILE_PX + 3 + number * LINE_PX), _fitted(draw, line, font, TILE_PX), fill=ink, font=font)
    return sheet


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width_px: int) -> str:
    """Returns the text, or as much of its end as fits: names differ at their end."""
    text = printable(text)
    if draw.textlength(text, font=font) <= width_px:
        return text
    while text and draw.textlength("…" + text, font=font) > width_px:
        text = text[1:]
    return "…" + text
