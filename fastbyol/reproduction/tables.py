"""The paper's pre-training tables as data: their rows, the run of each, its published accuracy, and what is expected of them at a small scale.

Source: Grill et al., tables 1, 5 and 14 to 22. The figures are those of the presets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastbyol.config import ablations
from fastbyol.config.errors import UserError
from fastbyol.config.plain import nearest_name
from fastbyol.config.presets import PRESETS

BYOL, SIMCLR = "BYOL", "SimCLR"
BASE_RUNS = {BYOL: "byol", SIMCLR: "simclr"}
"""The run without any change, of each method."""
_PRESET_OF = {"byol": "r50_300ep", "simclr": "simclr_r50_300ep"}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    run: name of its run; several tables may share a run. cells: what the row changes, one for each of the table's columns. paper_top1, paper_top5:
    the paper's linear evaluation in per cent; None where it gives none. base: the run that this one is compared with.
    """

    run: str
    cells: tuple[str, ...]
    paper_top1: float | None
    paper_top5: float | None
    method: str = BYOL
    base: str = "byol"


@dataclass(frozen=True)
class Table:
    """One table. hypothesis: what we expected of it at demo scale, written before any of it was run."""

    name: str
    title: str
    source: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    hypothesis: str
    options: tuple[str, ...] = ()
    """Options of a run that the table varies, whose values at another scale are not those in the cells."""


def preset_of(run: str) -> str:
    """Returns the name of the preset that is this run at the paper's scale."""
    return _PRESET_OF.get(run) or (run if run in PRESETS else f"ablation_{run}")


def paper_figures(run: str) -> tuple[float | None, float | None]:
    """Returns the paper's top-1 and top-5 of a run in per cent, None where it gives none."""
    found = re.match(r"(\d+\.?\d*) top-1 linear(?:, (\d+\.?\d*) top-5)?", PRESETS[preset_of(run)].expected)
    return (float(found[1]), float(found[2]) if found[2] else None) if found else (None, None)


def _row(run: str, *cells: object, method: str = BYOL, base: str = "", figures_of: str = "") -> Row:
    """Returns the row of a run. figures_of: the preset whose figures it has, where the paper printed others for the same run in another table."""
    top1, top5 = paper_figures(figures_of or run)
    return Row(run, tuple(str(cell) for cell in cells), top1, top5, method=method, base=base or BASE_RUNS[method])


def _shared_row(run: str, *cells: object, base: str = "byol") -> Row:
    """Returns the row of a run, or of the one of table 5a that is the same: the target is the online network with its gradient stopped."""
    same = ("predictor_target_stop_gradient_beta_0", "predictor_lr_1")
    return _row("tau_0" if run in same else run, *cells, base=base, figures_of=run)


def _simclr_base(*cells: str) -> Row:
    """First row of the SimCLR columns of tables 16 and 17, which are of an earlier reproduction than table 5b's."""
    return Row("simclr", cells, 67.9, 88.5, method=SIMCLR, base="simclr")


_BATCHES = (2048, 1024, 512, 256, 128, 64)
_VIEWS = {
    "no_flip": "no flip",
    "no_blur": "no blur",
    "no_colour": "no jitter, no grayscale",
    "no_jitter": "no jitter",
    "no_grayscale": "no grayscale",
    "no_blur_in_view2": "no blur in view 2",
    "no_solarize_in_view2": "no solarize in view 2",
    "neither_in_view2": "neither in view 2",
    "symmetric": "both views alike",
    "crop_only": "crop only",
    "crop_flip": "crop and flip",
    "crop_colour": "crop, jitter, grayscale",
    "crop_blur": "crop and blur",
}
_ENCODERS = ("r50", "r50x2", "r50x3", "r50x4", "r101", "r101x2", "r101x3", "r152", "r152x2", "r152x3", "r200", "r200x2")
# The tables' base row has these values.
_BASE_DEPTH, _BASE_DIM, _BASE_LR, _BASE_DECAY = (2, 2), 256, 0.3, 1e-6


def _infonce() -> tuple[Row, ...]:
    names = {"ema": "target network", "online": "online network", "stop_gradient": "online network, no gradient"}
    rows = [_row("byol", "yes", names["ema"], 0)]
    for (predictor, target, beta), _ in ablations.INFONCE.items():
        is_simclr = (predictor, target, beta) == ablations.SIMCLR
        run = "simclr" if is_simclr else f"{'predictor' if predictor else 'no_predictor'}_target_{target}_beta_{beta:g}"
        rows.append(
            _shared_row(run, "yes" if predictor else "no", names[target], f"{beta:g}{' (SimCLR)' if is_simclr else ''}", base="byol")
        )
    rows.append(_row("beta_1_alpha_0.1", "yes", names["ema"], 1))
    return tuple(rows)


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            name="encoders",
            title="Encoders",
            source="tables 1 and 9, 1000 epochs",
            columns=("encoder",),
            rows=tuple(_row(f"{name}_1000ep", name.replace("r", "ResNet-", 1), base="r50_1000ep") for name in _ENCODERS),
            options=("model.encoder", "model.width"),
            hypothesis="A wider encoder is better.",
        ),
        Table(
            name="batch",
            title="Batch size",
            source="figure 3a and table 16",
            columns=("method", "images"),
            rows=(
                *(_row("byol" if b == 4096 else f"batch_{b}", BYOL, b) for b in (4096, *_BATCHES)),
                _simclr_base(SIMCLR, "4096"),
                *(_row(f"simclr_batch_{b}", SIMCLR, b, method=SIMCLR) for b in _BATCHES),
            ),
            options=("rank_batch",),
            hypothesis="Both lose as batch norm sees fewer images; SimCLR, whose negatives are the same images, loses more and earlier.",
        ),
        Table(
            name="augmentations",
            title="Augmentations",
            source="figure 3b and table 17",
            columns=("method", "views"),
            rows=(
                _row("byol", BYOL, "all"),
                *(_row(f"views_{name}", BYOL, text) for name, text in _VIEWS.items()),
                _simclr_base(SIMCLR, "all"),
                *(_row(f"simclr_views_{name}", SIMCLR, text, method=SIMCLR) for name, text in _VIEWS.items()),
            ),
            hypothesis="Without jitter and grayscale both lose, and SimCLR loses more than BYOL; crops alone are worst for both.",
        ),
        Table(
            name="tau",
            title="Target decay rate",
            source="table 5a",
            columns=("tau_base",),
            rows=(
                _row("tau_1", "1, a constant random target"),
                _row("tau_0.999", 0.999),
                _row("byol", "0.99"),
                _row("tau_0.9", 0.9),
                _row("tau_0", "0, the online network itself"),
            ),
            options=("optim.tau_base",),
            hypothesis="There is a best value between the ends: a constant target teaches little, and none at all collapses.",
        ),
        Table(
            name="infonce",
            title="From BYOL to SimCLR: predictor, target network, negatives",
            source="tables 5b and 19",
            columns=("predictor", "target", "beta"),
            rows=_infonce(),
            hypothesis="Without a predictor and without negatives every run collapses. Of the runs without negatives only that with predictor and "
            "target network learns; every run with negatives learns.",
        ),
        Table(
            name="alpha_beta",
            title="Weight and temperature of the negatives",
            source="table 18",
            columns=("beta", "alpha"),
            rows=(
                _row("byol", 0, "no effect"),
                *(_row(f"beta_{b:g}_alpha_{a:g}", f"{b:g}", f"{a:g}") for b in ablations.BETA_ALPHA for a in ablations.ALPHAS),
            ),
            hypothesis="Negatives help little at any weight, and hurt at the lowest temperature.",
        ),
        Table(
            name="depth",
            title="Depth of projector and predictor",
            source="table 14a",
            columns=("projector layers", "predictor layers"),
            rows=tuple(
                _row("byol" if depth == _BASE_DEPTH else f"depth_{depth[0]}_{depth[1]}", *depth)
                for depth in sorted([_BASE_DEPTH, *ablations.DEPTH])
            ),
            hypothesis="A projector of one layer is worst, whatever the predictor; the rest is close.",
        ),
        Table(
            name="width",
            title="Dimensions of the projection",
            source="table 14b",
            columns=("dimensions",),
            rows=tuple(
                _row("byol" if dim == _BASE_DIM else f"projection_dim_{dim}", dim) for dim in sorted([_BASE_DIM, *ablations.PROJECTION_DIM])
            ),
            options=("model.projection_dim",),
            hypothesis="The fewest dimensions lose a little; from a quarter of the base's on nothing changes.",
        ),
        Table(
            name="learning_rate",
            title="Learning rate",
            source="table 15a",
            columns=("base_lr",),
            rows=tuple(_row("byol" if lr == _BASE_LR else f"lr_{lr:g}", f"{lr:g}") for lr in sorted([_BASE_LR, *ablations.BASE_LR])),
            options=("optim.base_lr",),
            hypothesis="A thirtieth of the rate is far worse in so few steps; a third more or less changes little.",
        ),
        Table(
            name="weight_decay",
            title="Weight decay",
            source="table 15b",
            columns=("weight decay",),
            rows=tuple(
                _row("byol" if wd == _BASE_DECAY else f"wd_{wd:g}", f"{wd:g}") for wd in sorted([_BASE_DECAY, *ablations.WEIGHT_DECAY])
            ),
            options=("optim.weight_decay",),
            hypothesis="In so few steps weight decay has hardly time to matter, and its absence does not make a run diverge.",
        ),
        Table(
            name="normalisation",
            title="Normalisation in the loss",
            source="table 20",
            columns=("normalisation",),
            rows=(_row("byol", "l2"), *(_row(f"loss_{name}", name.replace("_", " ")) for name in ablations.NORMALIZATION)),
            hypothesis="Layer norm is as good as l2; none and batch norm are worse.",
        ),
        Table(
            name="predictor_rate",
            title="Learning rates of the heads, without a slowly moving target",
            source="table 21, and table 22 for factors that table 21 does not have",
            columns=("projector x", "predictor x"),
            rows=(
                _row("byol", "1, with the moving target", 1),
                _row("predictor_lr_0", 1, 0),
                *(
                    _shared_row(f"predictor_lr_{b:g}" + (f"_projector_lr_{a:g}" if a != 1 else ""), f"{a:g}", f"{b:g}")
                    for a in ablations.HEAD_LR
                    for b in ablations.PREDICTOR_LRS
                ),
                _row("predictor_lr_20", 1, 20),
            ),
            hypothesis="A predictor that learns much faster than the projector prevents the collapse.",
        ),
    )
}


def table_named(name: str) -> Table:
    """Returns a table. Raises UserError that lists them if there is none of this name."""
    if name not in TABLES:
        raise UserError(f"table {name!r}: no such table{nearest_name(name, TABLES)}; there are {', '.join(TABLES)}, and all")
    return TABLES[name]
