"""The named runs against the paper's tables, copied here from protocol and paper, not from the presets."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from fastbyol.__main__ import main
from fastbyol.config.plain import flatten, from_plain, to_plain
from fastbyol.config.presets import PRESETS, preset_config
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.config.views import ABLATIONS, PAPER
from fastbyol.run.command_line import parse_train_config
from fastbyol.schedules import total_steps_at
from fastbyol.train import main as train

NUM_IMAGENET = 1_281_167


def _figures(name: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d", PRESETS[name].expected)]


def _changes(name: str) -> dict[str, object]:
    """Returns the dotted options that a preset changes in the 300-epoch run."""
    base, own = (flatten(to_plain(preset_config(n))) for n in ("r50_300ep", name))
    return {key: value for key, value in own.items() if base[key] != value}


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "base_lr", "weight_decay", "tau_base", "steps", "warmup"),
    [
        # Official configs/byol.py and appendix G; total and warm-up steps by its integer arithmetic.
        ("r50_40ep", 40, 4096, 0.45, 1e-6, 0.97, 12511, 3127),
        ("r50_100ep", 100, 4096, 0.45, 1e-6, 0.99, 31278, 3127),
        ("r50_300ep", 300, 4096, 0.3, 1e-6, 0.99, 93835, 3127),
        ("r50_1000ep", 1000, 4096, 0.2, 1.5e-6, 0.996, 312784, 3127),
        ("r50_1000ep_batch512", 1000, 512, 0.4, 1.5e-6, 0.9995, 2502279, 25022),
        ("r200x2_1000ep", 1000, 4096, 0.2, 1.5e-6, 0.996, 312784, 3127),
    ],
)
def test_the_papers_runs_have_its_numbers(name, epochs, batch, base_lr, weight_decay, tau_base, steps, warmup):
    config = preset_config(name)
    optim = config.optim
    assert (config.epochs, config.global_batch) == (epochs, batch)
    assert (optim.base_lr, optim.weight_decay, optim.tau_base) == (base_lr, weight_decay, tau_base)
    assert (optim.name, optim.momentum, optim.trust_coefficient) == ("lars", 0.9, 1e-3)
    assert total_steps_at(config.epochs, num_samples=NUM_IMAGENET, global_batch=batch) == steps
    assert total_steps_at(optim.warmup_epochs, num_samples=NUM_IMAGENET, global_batch=batch) == warmup
    assert config.views == PAPER
    assert (config.model.hidden_dim, config.model.projection_dim) == (4096, 256)


def test_imagenette_has_the_numbers_of_the_official_readme():
    config = preset_config("imagenette_r18")
    assert (config.model.encoder, config.views.size_px, config.global_batch, config.epochs) == ("resnet18", 128, 256, 1000)
    assert (config.optim.base_lr, config.optim.weight_decay) == (2.0, 1e-6)


TABLE_9 = {
    **{("r50", 1): (74.3, 91.6), ("r101", 1): (76.4, 93.0), ("r152", 1): (77.3, 93.7), ("r200", 1): (77.8, 93.9)},
    **{("r50", 2): (77.4, 93.6), ("r101", 2): (78.7, 94.3), ("r152", 2): (79.0, 94.6), ("r200", 2): (79.6, 94.8)},
    **{("r50", 3): (78.2, 93.9), ("r101", 3): (78.4, 94.2), ("r152", 3): (79.5, 94.6), ("r50", 4): (78.6, 94.2)},
}


def test_every_encoder_of_table_9_is_a_preset_with_its_figures():
    for (depth, width), figures in TABLE_9.items():
        name = f"{depth}x{width}_1000ep" if width > 1 else f"{depth}_1000ep"
        model = preset_config(name).model
        assert (model.encoder, model.width) == (depth.replace("r", "resnet"), width)
        assert tuple(_figures(name)) == figures
    assert {n for n in PRESETS if n.endswith("_1000ep")} == {f"{d}x{w}_1000ep" if w > 1 else f"{d}_1000ep" for d, w in TABLE_9}


BATCH_TABLE = {2048: (72.4, 90.7), 1024: (72.2, 90.7), 512: (72.2, 90.8), 256: (71.8, 90.7), 128: (69.6, 89.6), 64: (59.7, 83.2)}


@pytest.mark.parametrize("batch", BATCH_TABLE)
def test_a_preset_of_the_batch_table_accumulates_gradients_and_gives_batch_norm_its_batch(batch):
    name = f"ablation_batch_{batch}"
    config = preset_config(name)
    assert tuple(_figures(name)) == BATCH_TABLE[batch]
    assert config.global_batch == 4096
    accumulate = accumulation_of(config, world_size=8)
    assert 4096 / accumulate == batch
    assert set(_changes(name)) == {"rank_batch"}
    assert "--nproc-per-node 8 " in PRESETS[name].command(name)


TABLE_17 = {
    **{
        "no_flip": (71.9, 90.6),
        "no_blur": (71.2, 90.3),
        "no_colour": (63.4, 85.3),
        "no_jitter": (71.8, 90.7),
        "no_grayscale": (70.3, 89.8),
    },
    **{"no_blur_in_view2": (72.4, 90.8), "no_solarize_in_view2": (72.3, 90.8), "neither_in_view2": (72.2, 90.8), "symmetric": (72.5, 90.8)},
    **{"crop_only": (59.4, 82.4), "crop_flip": (60.1, 83.0), "crop_colour": (70.7, 90.0), "crop_blur": (61.1, 83.9)},
}


def test_every_row_of_table_17_is_a_preset_that_changes_only_the_views():
    assert set(TABLE_17) == set(ABLATIONS)
    for row, figures in TABLE_17.items():
        name = f"ablation_views_{row}"
        assert preset_config(name).views == ABLATIONS[row]
        assert all(key.startswith("views.") for key in _changes(name))
        assert tuple(_figures(name)) == figures


ALPHAS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
TABLE_18 = {
    0.1: ((72.2, 90.7), (72.4, 90.9), (72.7, 91.0), (72.6, 90.9), (72.5, 90.9), (72.5, 90.9)),
    0.5: ((70.9, 90.2), (72.0, 90.8), (72.7, 91.2), (72.7, 91.1), (72.6, 91.1), (72.5, 91.0)),
    1.0: ((53.9, 77.5), (70.9, 90.3), (72.7, 91.1), (72.7, 91.1), (72.6, 91.0), (72.6, 91.1)),
}
COLLAPSES = {"monitors.stop_on_collapse": False}
ONE_CHANGE = {
    # Table 5a.
    "tau_1": ({"optim.tau_base": 1.0}, (18.8,)),
    "tau_0.999": ({"optim.tau_base": 0.999}, (69.8,)),
    "tau_0.9": ({"optim.tau_base": 0.9}, (68.4,)),
    "tau_0": ({"objective.target": "stop_gradient", **COLLAPSES}, (0.3,)),
    # Tables 5b and 19.
    "no_predictor_target_ema_beta_1": ({"model.predictor_layers": 0, "objective.beta": 1.0}, (70.7,)),
    "no_predictor_target_online_beta_1": ({"model.predictor_layers": 0, "objective.target": "online", "objective.beta": 1.0}, (69.4,)),
    "predictor_target_online_beta_1": ({"objective.target": "online", "objective.beta": 1.0}, (69.1,)),
    "predictor_target_stop_gradient_beta_1": ({"objective.target": "stop_gradient", "objective.beta": 1.0}, (70.2,)),
    "no_predictor_target_stop_gradient_beta_1": (
        {"model.predictor_layers": 0, "objective.target": "stop_gradient", "objective.beta": 1.0},
        (69.2,),
    ),
    "predictor_target_stop_gradient_beta_0": ({"objective.target": "stop_gradient", **COLLAPSES}, (5.5,)),
    "predictor_target_online_beta_0": ({"objective.target": "online", **COLLAPSES}, (0.3,)),
    "no_predictor_target_ema_beta_0": ({"model.predictor_layers": 0, **COLLAPSES}, (0.2,)),
    "no_predictor_target_stop_gradient_beta_0": (
        {"model.predictor_layers": 0, "objective.target": "stop_gradient", **COLLAPSES},
        (0.1,),
    ),
    "no_predictor_target_online_beta_0": ({"model.predictor_layers": 0, "objective.target": "online", **COLLAPSES}, (0.1,)),
    # Appendix F.
    **{
        f"depth_{projector}_{predictor}": ({"model.projector_layers": projector, "model.predictor_layers": predictor}, figures)
        for projector, predictor, figures in (
            (1, 1, (61.9, 86.0)),
            (1, 2, (65.0, 86.8)),
            (1, 3, (65.7, 86.8)),
            (2, 1, (71.5, 90.7)),
            (2, 3, (71.4, 90.4)),
            (3, 1, (71.4, 90.4)),
            (3, 2, (72.1, 90.5)),
            (3, 3, (72.1, 90.5)),
        )
    },
    **{
        f"projection_dim_{dim}": ({"model.projection_dim": dim}, figures)
        for dim, figures in ((16, (69.9, 89.9)), (32, (71.3, 90.6)), (64, (72.2, 90.9)), (128, (72.5, 91.0)), (512, (72.6, 91.0)))
    },
    **{
        f"lr_{lr:g}": ({"optim.base_lr": lr}, figures)
        for lr, figures in (
            (0.01, (34.8, 60.8)),
            (0.1, (65.0, 87.0)),
            (0.2, (71.7, 90.6)),
            (0.4, (72.3, 90.6)),
            (0.5, (71.5, 90.1)),
            (1.0, (69.4, 89.2)),
        )
    },
    **{
        f"wd_{decay:g}": ({"optim.weight_decay": decay}, figures)
        for decay, figures in ((0.0, ()), (1e-7, (72.1, 90.4)), (5e-7, (72.6, 91.0)), (5e-6, (71.0, 90.0)), (1e-5, (69.6, 89.3)))
    },
    # Table 20, and the closed form of appendix I.2.
    "loss_layer_norm": ({"objective.normalization": "layer_norm"}, (72.5, 90.1)),
    "loss_none": ({"objective.normalization": "none"}, (67.4, 87.1)),
    "loss_batch_norm": ({"objective.normalization": "batch_norm"}, (65.3, 85.3)),
    "predictor_least_squares": (
        {"model.predictor_layers": 0, "objective.target": "stop_gradient", "objective.predictor": "least_squares"},
        (52.5,),
    ),
    # Table 18.
    **{
        f"beta_{beta:g}_alpha_{alpha:g}": ({"objective.beta": beta, "objective.alpha": alpha}, figures)
        for beta, row in TABLE_18.items()
        for alpha, figures in zip(ALPHAS, row, strict=True)
    },
}
BASE = {"model.projector_layers": 2, "model.predictor_layers": 2, "objective.alpha": 0.1}


@pytest.mark.parametrize("row", ONE_CHANGE)
def test_an_ablation_changes_what_its_row_says_and_names_its_figure(row):
    changes, figures = ONE_CHANGE[row]
    assert _changes(f"ablation_{row}") == {key: value for key, value in changes.items() if BASE.get(key) != value}
    assert tuple(_figures(f"ablation_{row}")) == figures
    assert "paper, " in PRESETS[f"ablation_{row}"].source


TABLE_21 = {"0": "0.01", "1": "5.5", "2": "62.8", "10": "66.6", "20": "66.3"}
TABLE_22 = """
    mu   1    1.5   2     5     10
    1    3.2  25.7  60.8  66.7  66.9
    1.5  1.4  9.2   55.2  61.5  66.0
    2    2.0  5.3   15.8  60.9  66.3
    5    1.5  2.5   2.5   20.5  60.5
    10   0.1  2.1   1.9   2.8   8.3
"""


def _table_22() -> dict[tuple[str, str], str]:
    """Accuracies by the projector's factor, then the predictor's."""
    (_, *predictors), *rows = (line.split() for line in TABLE_22.strip().splitlines())
    return {(mu, lambda_): figure for mu, *figures in rows for lambda_, figure in zip(predictors, figures, strict=True)}


def _head_lr_name(projector: str, predictor: str) -> str:
    return f"predictor_lr_{predictor}" + ("" if projector == "1" else f"_projector_lr_{projector}")


HEAD_LRS = {_head_lr_name(*factors): factors for factors in [*_table_22(), *(("1", predictor) for predictor in TABLE_21)]}


@pytest.mark.parametrize("row", HEAD_LRS)
def test_every_cell_of_tables_21_and_22_is_a_preset_of_the_heads_learning_rates(row):
    projector, predictor = HEAD_LRS[row]
    preset = PRESETS[f"ablation_{row}"]
    changes = {"optim.projector_lr_factor": float(projector), "optim.predictor_lr_factor": float(predictor)}
    expected = {key: value for key, value in changes.items() if value != 1} | {"objective.target": "stop_gradient"}
    assert _changes(f"ablation_{row}") == expected | (COLLAPSES if float(predictor) <= float(projector) else {})
    in_22 = _table_22().get((projector, predictor))
    if projector == "1" and predictor in TABLE_21:
        assert preset.expected == f"{TABLE_21[predictor]} top-1 linear"
        assert preset.source == "paper, table 21" + (f"; {in_22} in table 22" if in_22 else "")
    else:
        assert (preset.expected, preset.source) == (f"{in_22} top-1 linear", "paper, table 22")


def test_every_ablation_is_in_a_table_of_the_paper():
    both = {f"batch_{b}" for b in BATCH_TABLE} | {f"views_{v}" for v in TABLE_17}
    known = both | {f"simclr_{name}" for name in both} | set(ONE_CHANGE) | set(HEAD_LRS)
    assert {name.removeprefix("ablation_") for name in PRESETS if name.startswith("ablation_")} == known


def test_a_preset_without_options_is_the_preset_itself():
    for name in PRESETS:
        if not name.startswith("ablation_") or name.endswith("_1"):
            assert parse_train_config(["--preset", name], usage="") == preset_config(name)


def test_every_preset_survives_yaml():
    for preset in PRESETS.values():
        assert from_plain(TrainConfig, yaml.safe_load(yaml.safe_dump(to_plain(preset.config)))) == preset.config


@pytest.mark.parametrize("name", ["own_tiny", "own_small", "own", "own_large"])
def test_the_presets_for_own_images_train_a_step_and_say_what_to_change_first(name, image_folder, tmp_path, capsys):
    smaller = (
        "--global_batch=4",
        "--model.hidden_dim=16",
        "--views.size_px=32",
        "--steps=1",
        "--optim.warmup_epochs=0",
        "--data.workers=1",
        # A ResNet-50 takes twice as long to build, train and save; tests/test_models.py holds it against the official one.
        *(["--model.encoder=resnet18"] if PRESETS[name].config.model.encoder == "resnet50" else []),
    )
    train(["--preset", name, *smaller, "--data.train", str(image_folder), "--out", str(tmp_path / name)])
    assert "step 1/1" in capsys.readouterr().err
    main(["presets", name])
    assert f"    change    {PRESETS[name].first}\n" in capsys.readouterr().out


def test_the_rates_of_the_presets_for_own_images_are_those_of_their_sources():
    own, small, large = (preset_config(name) for name in ("own", "own_small", "own_large"))
    assert (own.global_batch, own.optim.base_lr, own.optim.weight_decay) == (512, 0.4, 1.5e-6), "appendix G"
    assert own.optim.tau_base == pytest.approx(0.99 ** (512 / 4096), abs=5e-5)
    assert abs(small.steps * small.global_batch / 9469 - 1000) < 100, "a thousand epochs of Imagenette"
    assert replace(large, epochs=300) == preset_config("r50_300ep")


def test_presets_are_listed_with_command_figure_and_source(capsys):
    main(["presets"])
    listed = capsys.readouterr().out
    assert [line for line in listed.splitlines() if line and line[0] != " "] == list(PRESETS)
    main(["presets", "tau_0.9"])
    listed = capsys.readouterr().out
    assert listed.count("    command   ") == 2  # 0.999 too
    assert "expected  68.4 top-1 linear (paper, table 5a)" in listed
    assert "torchrun --nproc-per-node 8 -m fastbyol train --preset ablation_tau_0.9 --data.train train.beton" in listed
    with pytest.raises(SystemExit):
        main(["presets", "albation_tau_1"])
    assert "did you mean ablation_tau_1?" in capsys.readouterr().err
