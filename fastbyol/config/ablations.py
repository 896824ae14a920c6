"""The paper's ablations as presets: one per table row, with the accuracy that the paper reports for it.

Each changes one thing in the 300-epoch ResNet-50 run (72.5 top-1 / 90.8 top-5): Grill et al., section 5, appendices F and I. SimCLR is
the member of the InfoNCE-beta family without predictor and target network and with beta 1, and BYOL's head, as in table 5b.
Differs from the paper: its SimCLR columns of tables 16 and 17 are of an earlier reproduction with another head and scale of the loss (67.9
top-1 where table 5b has 69.4, appendix F.5), so compare their changes against their own first row and not the figures themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fastbyol.config.schema import PAPER_RANKS, ModelConfig, MonitorsConfig, ObjectiveConfig, OptimConfig, Preset, TrainConfig
from fastbyol.config.views import ABLATIONS as VIEW_ABLATIONS

BASE = TrainConfig()
BASE_FIGURE = "72.5 top-1 linear, 90.8 top-5"

# Number of images that batch norm sees at once. The ranks share them, and gradients are averaged over 4096 / that number micro-batches.
_BATCH = {2048: "72.4 / 90.7", 1024: "72.2 / 90.7", 512: "72.2 / 90.8", 256: "71.8 / 90.7", 128: "69.6 / 89.6", 64: "59.7 / 83.2"}
_VIEWS = {
    "no_flip": "71.9 / 90.6",
    "no_blur": "71.2 / 90.3",
    "no_colour": "63.4 / 85.3",
    "no_jitter": "71.8 / 90.7",
    "no_grayscale": "70.3 / 89.8",
    "no_blur_in_view2": "72.4 / 90.8",
    "no_solarize_in_view2": "72.3 / 90.8",
    "neither_in_view2": "72.2 / 90.8",
    "symmetric": "72.5 / 90.8",
    "crop_only": "59.4 / 82.4",
    "crop_flip": "60.1 / 83.0",
    "crop_colour": "70.7 / 90.0",
    "crop_blur": "61.1 / 83.9",
}
_TAU = {1.0: "18.8", 0.999: "69.8", 0.9: "68.4"}
# (predictor, target, beta) with alpha 0.1; the row (yes, ema, 1) is beta_1_alpha_0.1 below.
INFONCE = {
    (0, "ema", 1.0): "70.7",
    (0, "online", 1.0): "69.4",
    (2, "online", 1.0): "69.1",
    (2, "stop_gradient", 1.0): "70.2",
    (0, "stop_gradient", 1.0): "69.2",
    (2, "stop_gradient", 0.0): "5.5",
    (2, "online", 0.0): "0.3",
    (0, "ema", 0.0): "0.2",
    (0, "stop_gradient", 0.0): "0.1",
    (0, "online", 0.0): "0.1",
}
SIMCLR = (0, "online", 1.0)
SIMCLR_BASE = replace(BASE, model=ModelConfig(predictor_layers=0), objective=ObjectiveConfig(target="online", beta=1.0))
SIMCLR_FIGURE = "69.4 top-1 linear"
_SIMCLR_BATCH = {2048: "67.8 / 88.5", 1024: "67.4 / 88.1", 512: "66.5 / 87.6", 256: "64.3 / 86.3", 128: "63.6 / 85.9", 64: "59.2 / 83.0"}
_SIMCLR_VIEWS = {
    "no_flip": "67.3 / 88.2",
    "no_blur": "65.2 / 86.6",
    "no_colour": "45.7 / 70.6",
    "no_jitter": "63.7 / 85.9",
    "no_grayscale": "61.9 / 84.1",
    "no_blur_in_view2": "67.5 / 88.4",
    "no_solarize_in_view2": "67.7 / 88.2",
    "neither_in_view2": "67.4 / 88.1",
    "symmetric": "68.1 / 88.4",
    "crop_only": "40.3 / 64.8",
    "crop_flip": "40.2 / 64.8",
    "crop_colour": "64.2 / 86.2",
    "crop_blur": "41.7 / 66.4",
}
NORMALIZATION = {"layer_norm": "72.5 / 90.1", "none": "67.4 / 87.1", "batch_norm": "65.3 / 85.3"}
# Without a slowly moving target. Table 21: factors of the predictor's learning rate; table 22: of the projector's (rows) and the predictor's.
_PREDICTOR_LR = {0.0: "0.01", 1.0: "5.5", 2.0: "62.8", 10.0: "66.6", 20.0: "66.3"}
PREDICTOR_LRS = (1.0, 1.5, 2.0, 5.0, 10.0)
HEAD_LR = {
    1.0: ("3.2", "25.7", "60.8", "66.7", "66.9"),
    1.5: ("1.4", "9.2", "55.2", "61.5", "66.0"),
    2.0: ("2.0", "5.3", "15.8", "60.9", "66.3"),
    5.0: ("1.5", "2.5", "2.5", "20.5", "60.5"),
    10.0: ("0.1", "2.1", "1.9", "2.8", "8.3"),
}
ALPHAS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
BETA_ALPHA = {
    0.1: ("72.2 / 90.7", "72.4 / 90.9", "72.7 / 91.0", "72.6 / 90.9", "72.5 / 90.9", "72.5 / 90.9"),
    0.5: ("70.9 / 90.2", "72.0 / 90.8", "72.7 / 91.2", "72.7 / 91.1", "72.6 / 91.1", "72.5 / 91.0"),
    1.0: ("53.9 / 77.5", "70.9 / 90.3", "72.7 / 91.1", "72.7 / 91.1", "72.6 / 91.0", "72.6 / 91.1"),
}
DEPTH = {
    (1, 1): "61.9 / 86.0",
    (1, 2): "65.0 / 86.8",
    (1, 3): "65.7 / 86.8",
    (2, 1): "71.5 / 90.7",
    (2, 3): "71.4 / 90.4",
    (3, 1): "71.4 / 90.4",
    (3, 2): "72.1 / 90.5",
    (3, 3): "72.1 / 90.5",
}
PROJECTION_DIM = {16: "69.9 / 89.9", 32: "71.3 / 90.6", 64: "72.2 / 90.9", 128: "72.5 / 91.0", 512: "72.6 / 91.0"}
BASE_LR = {0.01: "34.8 / 60.8", 0.1: "65.0 / 87.0", 0.2: "71.7 / 90.6", 0.4: "72.3 / 90.6", 0.5: "71.5 / 90.1", 1.0: "69.4 / 89.2"}
WEIGHT_DECAY = {0.0: "diverges", 1e-7: "72.1 / 90.4", 5e-7: "72.6 / 91.0", 5e-6: "71.0 / 90.0", 1e-5: "69.6 / 89.3"}


def ablation_presets() -> dict[str, Preset]:
    """Returns every ablation by name: 'ablation_' and what it changes."""
    rows = [*_runs(), *_objectives(), *_networks(), *_optimizers(), *_near_optimal_predictors()]
    return {
        f"ablation_{name}": Preset(
            what=f"the 300-epoch run with {what}", config=config, expected=_figure(figure), source=f"paper, {source}"
        )
        for name, what, config, figure, source in rows
    }


_Row = tuple[str, str, TrainConfig, str, str]
"""(name, what it is, config, 'top-1' or 'top-1 / top-5', table in the paper)."""


def _figure(text: str) -> str:
    if text == "diverges":
        return text
    top1, _, top5 = text.partition(" / ")
    return f"{top1} top-1 linear" + (f", {top5} top-5" if top5 else "")


def _runs() -> Iterator[_Row]:
    methods = (("", "", BASE, _BATCH, _VIEWS), ("simclr_", "SimCLR and ", SIMCLR_BASE, _SIMCLR_BATCH, _SIMCLR_VIEWS))
    for prefix, method, base, batches, views in methods:
        for batch, figure in batches.items():
            what = f"{method}BN over {batch} images and {4096 // batch} micro-batches a step (rank_batch is for {PAPER_RANKS} ranks)"
            yield f"{prefix}batch_{batch}", what, replace(base, rank_batch=batch // PAPER_RANKS), figure, "table 16"
        for name, figure in views.items():
            what = f"{method}views {name.replace('_', ' ')}"
            yield f"{prefix}views_{name}", what, replace(base, views=VIEW_ABLATIONS[name]), figure, "table 17"


def _objectives() -> Iterator[_Row]:
    for tau, figure in _TAU.items():
        what = f"tau_base {tau:g}" + (", a constant random target" if tau == 1 else "")
        yield f"tau_{tau:g}", what, replace(BASE, optim=OptimConfig(tau_base=tau)), figure, "table 5a"
    # The paper keeps tau at 0 here, but tau_base = 0 would rise along the cosine. A constant 0 equals the online network without gradient.
    constant_zero = replace(BASE, objective=ObjectiveConfig(target="stop_gradient"), monitors=MonitorsConfig(stop_on_collapse=False))
    yield "tau_0", "tau 0 throughout (5.5 in table 19)", constant_zero, "0.3", "table 5a"
    for (predictor, target, beta), figure in INFONCE.items():
        name = f"{'predictor' if predictor else 'no_predictor'}_target_{target}_beta_{beta:g}"
        what = f"{'a' if predictor else 'no'} predictor, target {target}, beta {beta:g}" + (
            " (SimCLR)" if (predictor, target, beta) == SIMCLR else ""
        )
        config = replace(BASE, model=ModelConfig(predictor_layers=predictor), objective=ObjectiveConfig(target=target, beta=beta))
        if beta == 0:  # these runs are meant to collapse
            config = replace(config, monitors=MonitorsConfig(stop_on_collapse=False))
        yield name, what, config, figure, "tables 5b and 19"
    for beta, figures in BETA_ALPHA.items():
        for alpha, figure in zip(ALPHAS, figures, strict=True):
            config = replace(BASE, objective=ObjectiveConfig(beta=beta, alpha=alpha))
            yield f"beta_{beta:g}_alpha_{alpha:g}", f"InfoNCE's negative term, beta {beta:g}, alpha {alpha:g}", config, figure, "table 18"
    for normalization, figure in NORMALIZATION.items():
        what = f"normalisation {normalization} in the loss"
        yield f"loss_{normalization}", what, replace(BASE, objective=ObjectiveConfig(normalization=normalization)), figure, "table 20"


def _networks() -> Iterator[_Row]:
    for (projector, predictor), figure in DEPTH.items():
        config = replace(BASE, model=ModelConfig(projector_layers=projector, predictor_layers=predictor))
        what = f"a projector of {projector} and a predictor of {predictor} layers"
        yield f"depth_{projector}_{predictor}", what, config, figure, "table 14a"
    for dim, figure in PROJECTION_DIM.items():
        config = replace(BASE, model=ModelConfig(projection_dim=dim))
        yield f"projection_dim_{dim}", f"projections of {dim} dimensions", config, figure, "table 14b"


def _optimizers() -> Iterator[_Row]:
    for lr, figure in BASE_LR.items():
        yield f"lr_{lr:g}", f"base_lr {lr:g}", replace(BASE, optim=OptimConfig(base_lr=lr)), figure, "table 15a"
    for decay, figure in WEIGHT_DECAY.items():
        config = replace(BASE, optim=OptimConfig(weight_decay=decay))
        yield f"wd_{decay:g}", f"weight decay {decay:g}", config, figure, "table 15b"


def _near_optimal_predictors() -> Iterator[_Row]:
    no_average = replace(BASE, objective=ObjectiveConfig(target="stop_gradient"))
    for factor, figure in _PREDICTOR_LR.items():
        also = dict(zip(PREDICTOR_LRS, HEAD_LR[1.0], strict=True)).get(factor)
        yield _head_lr_row(
            no_average, projector=1.0, predictor=factor, figure=figure, source="table 21" + (f"; {also} in table 22" if also else "")
        )
    for projector, figures in HEAD_LR.items():
        for predictor, figure in zip(PREDICTOR_LRS, figures, strict=True):
            if projector != 1 or predictor not in _PREDICTOR_LR:
                yield _head_lr_row(no_average, projector=projector, predictor=predictor, figure=figure, source="table 22")
    solved = ObjectiveConfig(target="stop_gradient", predictor="least_squares")
    config = replace(BASE, model=ModelConfig(predictor_layers=0), objective=solved)
    what = "tau 0 throughout and the best linear predictor of each batch in closed form"
    yield "predictor_least_squares", what, config, "52.5", "section 5 and appendix I.2"


def _head_lr_row(base: TrainConfig, *, projector: float, predictor: float, figure: str, source: str) -> _Row:
    config = replace(base, optim=OptimConfig(projector_lr_factor=projector, predictor_lr_factor=predictor))
    if predictor <= projector:  # "typically collapses or performs poorly" (appendix I.1)
        config = replace(config, monitors=MonitorsConfig(stop_on_collapse=False))
    name = f"predictor_lr_{predictor:g}" + (f"_projector_lr_{projector:g}" if projector != 1 else "")
    what = f"tau 0 throughout and the learning rate of the predictor x {predictor:g}" + (
        f", of the projector x {projector:g}" if projector != 1 else ""
    )
    return name, what, config, figure, source
