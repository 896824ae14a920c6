"""The configuration of a row: at the paper's scale its preset, at demo scale the same change made to a small recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastbyol.config.ablations import BASE
from fastbyol.config.plain import flatten, from_plain, to_plain
from fastbyol.config.presets import preset_config
from fastbyol.config.schema import TrainConfig
from fastbyol.reproduction.tables import preset_of

SCALES = ("demo", "paper")
UNCHANGED = ("byol", "r50_1000ep")
"""Runs without any change: the base of every table."""
FEWEST_BN_IMAGES = 4
"""Batch norm over fewer images erases what distinguishes them: with two, every channel of the heads is plus or minus one."""
RELATIVE = {
    "model.projection_dim": BASE.model.projection_dim,
    "optim.base_lr": BASE.optim.base_lr,
    "optim.weight_decay": BASE.optim.weight_decay,
}
"""Options that a row changes by a factor of the paper's value; the demo's own value is changed by the same factor."""
_BATCH_RUN = re.compile(r"(?:simclr_)?batch_(\d+)")
_VIEWS_RUN = re.compile(r"(?:simclr_)?views_(\w+)")
_KEPT = {"crop_only": (), "crop_flip": ("flip_p",), "crop_colour": ("jitter_p", "gray_p"), "crop_blur": ("blur_p",)}
"""What the rows that begin with 'crop' keep beside the crop."""
VIEWS = ("view1", "view2")


@dataclass(frozen=True)
class Choice:
    """What a row is at a scale.

    config: None where the row has no meaning at this scale. changes: the options that differ from the base's, with their values.
    left_out: why there is no config.
    """

    config: TrainConfig | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""


def row_config(run: str, *, scale: str, base: TrainConfig, ranks: int = 1) -> Choice:
    """Returns the config of a run.

    base: the config of 'byol', the run without any change. ranks: number of processes, which share the images of a batch norm.
    """
    changes = _paper_changes(run)
    if scale == "demo":
        if reason := _why_not_at_demo_scale(run, changes, base):
            return Choice(None, left_out=reason)
        changes = _at_demo_scale(run, changes, base)
    if batch := _BATCH_RUN.fullmatch(run):
        images = base.global_batch * int(batch[1]) // BASE.global_batch
        if images < FEWEST_BN_IMAGES or images % ranks:
            return Choice(
                None, left_out=f"batch norm would see {images} of the {base.global_batch} images, in {ranks} process{'es' * (ranks > 1)}"
            )
        changes["rank_batch"] = images // ranks
    plain = flatten(to_plain(base))
    changes = {name: value for name, value in changes.items() if plain[name] != value}
    unchanged = row_config("simclr", scale=scale, base=base).changes if run.startswith("simclr_") else {}
    if changes == unchanged and run not in UNCHANGED:
        return Choice(None, left_out="the recipe is like this already")
    return Choice(with_changes(base, changes), changes)


def run_at(scale: str, run: str) -> str:
    """Returns the name of the run that stands for this one at a scale: both unchanged runs are one at demo scale."""
    return UNCHANGED[0] if scale == "demo" and run in UNCHANGED else run


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Returns the config with these options, by dotted names, set to other values."""
    values = to_plain(config)
    for name, value in changes.items():
        *groups, last = name.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[last] = value
    return from_plain(TrainConfig, values)


def _paper_changes(run: str) -> dict[str, Any]:
    """Returns the options that the run's preset changes in the 300-epoch run, with their values."""
    base, own = (flatten(to_plain(config)) for config in (BASE, preset_config(preset_of(run))))
    return {name: value for name, value in own.items() if base[name] != value}


def _why_not_at_demo_scale(run: str, changes: Mapping[str, Any], base: TrainConfig) -> str:
    """Returns why the change means nothing in this recipe, or ''."""
    if "model.encoder" in changes:
        return "the depth of the paper's encoders does not carry over to this one"
    views = _VIEWS_RUN.fullmatch(run)
    if views and views[1] == "symmetric" and base.views.view1 == base.views.view2:
        return "both views of the recipe are alike already"
    if views and views[1] == "no_colour" and not any(getattr(base.views, view).gray_p for view in VIEWS):
        return "the recipe has no grayscale, so this is the row without jitter"
    kept = _KEPT.get(views[1], ()) if views else ()
    if kept and not any(getattr(getattr(base.views, view), name) for view in VIEWS for name in kept):
        return "the recipe does not have " + " or ".join(name.removesuffix("_p") for name in kept)
    return ""


def _at_demo_scale(run: str, changes: Mapping[str, Any], base: TrainConfig) -> dict[str, Any]:
    """Returns the options, with their values, that make the same change in the recipe `base`."""
    if run.endswith("_1000ep"):  # table 1's encoders; length and rates are those of the 1000-epoch run, which is another recipe
        return {name: value for name, value in changes.items() if name == "model.width"}
    plain, found = flatten(to_plain(base)), dict(changes)
    for name, value in RELATIVE.items():
        if name in changes:
            scaled = plain[name] * changes[name] / value
            found[name] = max(1, round(scaled)) if isinstance(plain[name], int) else scaled
    views = _VIEWS_RUN.fullmatch(run)
    if views and views[1] in _KEPT:
        found |= {f"views.{view}.rotation_deg": 0.0 for view in VIEWS}
    return found
