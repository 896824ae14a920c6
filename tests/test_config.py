"""Parsing the command line into a checked config: what is accepted, what is refused and how."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import yaml

from fastbyol.config.errors import UserError, one_line_errors
from fastbyol.config.plain import flatten, from_plain, to_plain
from fastbyol.config.presets import preset_config
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.config.views import ABLATIONS, PAPER, ViewSpec, blur_taps
from fastbyol.run.command_line import field_docs, parse_train_config


def _parse(*arguments: str) -> TrainConfig:
    return parse_train_config(arguments, usage="")


def test_options_win_over_a_file_and_a_file_over_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"epochs": 7, "optim": {"base_lr": 0.5, "tau_base": 0.5}}))
    typed = ("--optim.tau_base", "0.25", "--views.view2.crop_area", "[0.2, 0.9]")
    config = _parse("--preset", "r50_100ep", "--config", str(file), *typed)
    assert config == _parse(*typed, "--config", str(file), "--preset", "r50_100ep"), "whatever the order"
    assert config.epochs == 7
    assert config.optim.base_lr == 0.5
    assert config.optim.tau_base == 0.25
    assert config.optim.weight_decay == preset_config("r50_100ep").optim.weight_decay
    assert config.views.view2.crop_area == (0.2, 0.9)
    assert config.views.view1.crop_area == (0.08, 1.0)


def test_steps_take_the_place_of_the_epochs_of_a_file_or_preset_and_the_other_way_round(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"preset": "own_small", "epochs": 7, "optim": {"warmup_steps": 20}}))
    budgets = [
        (c.epochs, c.steps) for c in (_parse("--steps", "9"), _parse("--preset=own_small", "--epochs=3"), _parse("--config", str(file)))
    ]
    assert budgets == [(0, 9), (3, 0), (7, 0)]
    assert _parse("--config", str(file), "--steps=5", "--optim.warmup_epochs=1").steps == 5
    assert _parse("--config", str(file), "--optim.warmup_epochs=1").optim.warmup_steps == 0
    assert _parse("--optim.warmup_steps=4").optim.warmup_epochs == 0
    # Values that read like names of options, and a whole group in one value.
    assert _parse("--preset", "own_small", "--out", "steps", "--epochs", "5").epochs == 5
    assert _parse("--optim", '{"warmup_steps": 5}').optim.warmup_epochs == 0
    assert _parse('--optim={"warmup_steps": 5}').optim.warmup_steps == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "r50_300"], r"preset = 'r50_300': no such preset \(did you mean r50_300ep\?\)"),
        (["--preset"], "preset: needs a name"),
        (["--optim.base_lrr", "1"], r"--optim.base_lrr: no such option \(did you mean --optim.base_lr\?\)"),
        (["--optim.base_lr", "fast"], "optim.base_lr = fast: must be a number"),
        (["--optim.base_lr", "-1"], "optim.base_lr = -1.0: must be a number > 0"),
        (["--optim.base_lr", "nan"], "optim.base_lr.*nan"),
        (["--optim.tau_base", "1.5"], r"optim.tau_base = 1.5: must be a probability in \[0, 1\]"),
        (["--optim.momentum", "1"], "optim.momentum = 1.0"),
        (["--optim.name", "adam"], "optim.name = 'adam': must be one of lars"),
        (["--optim.trust_coefficient", "0"], "optim.trust_coefficient = 0.0: must be a number > 0"),
        (["--epochs", "0"], "epochs = 0.0"),
        (["--epochs", "1e308"], r"epochs = 1e\+308: must be a number in \[0, 1e\+09\]"),
        (["--optim.warmup_epochs", "1e308"], r"optim.warmup_epochs = 1e\+308"),
        (["--data", "photos"], "data = 'photos': is a group of options; give one of them, for example --data.train"),
        (["--precision.channels_last", "maybe"], "precision.channels_last = maybe: must be true or false"),
        (["--steps", "3", "--epochs", "2"], "epochs = 2: has no effect where steps is 3; give one of them"),
        (
            ["--optim.warmup_steps", "3", "--optim.warmup_epochs", "2"],
            "optim.warmup_epochs = 2: has no effect where optim.warmup_steps is 3",
        ),
        (["--steps", "-1"], "steps = -1"),
        (["--global_batch", "0"], "global_batch = 0"),
        (["--global_batch", "1.5"], "global_batch = 1.5: must be a whole number, written out"),
        (["--global_batch", "1e3"], "global_batch = 1000.0: must be a whole number, written out: 4096"),
        (["--rank_batch", "-4"], "rank_batch = -4"),
        (["--keep_checkpoints", "1"], "keep_checkpoints = 1: must be a number >= 2"),
        (["--seed", "-1"], "seed = -1"),
        (["--views.size_px", "0"], "size_px = 0"),
        (["--views.view1.blur_p", "1.1"], "views.view1.blur_p = 1.1: must be a probability"),
        (["--views.view1.blur_sigma", "[0, 1]"], "blur_sigma = .*increasing pair"),
        (["--views.view1.crop_area", "[0.9, 0.1]"], "crop_area = .*increasing pair"),
        (["--views.view1.crop_area", "[0.9]"], "crop_area.*2 elements"),
        (["--views.view1.crop_area", "0.5", "1.0"], r"views.view1.crop_area = 0.5: must be a list in brackets without spaces: \[0.5,1.0\]"),
        (["--data.backend", "lmdb"], "data.backend = 'lmdb': must be one of auto"),
        (["--data.workers", "-1"], "data.workers = -1"),
        (["--precision.autocast", "int8"], "precision.autocast = 'int8'"),
        (["--precision.compile", "maybe"], "precision.compile = 'maybe': must be one of auto, yes, no"),
        (["--model.stem", "big"], "model.stem = 'big'"),
        (["--model.hidden_dim", "0"], "model.hidden_dim = 0"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--config", "{tmp_path}"], "config = .*cannot be read .Is a directory"),
        (["--config"], "config: needs a YAML file"),
        (["--out"], "out"),
        (["--resume", "perhaps"], "resume = 'perhaps': must be one of auto, must, never"),
        (["--resum", "must"], r"--resum: no such option \(did you mean --resume\?\)"),
        (["--keep_every_epochs", "-1"], "keep_every_epochs = -1.0: must be a number >= 0"),
        (["--keep_every_epochs", "nan"], "keep_every_epochs.*nan"),
        (["--timeout_s", "0"], "timeout_s = 0.0: must be a number in"),
        (["--timeout_s", ".inf"], "timeout_s = inf"),
        (["--grace_s", "nan"], "grace_s.*nan"),
        (["--grace_s", "1e9"], "grace_s = 1000000000.0: must be a number in"),
        (["--epochs", ".inf"], "epochs = inf"),
        (["--epochs", "-3"], "epochs = -3.0: must be a number > 0"),
        (["--log_every", "0"], "log_every = 0"),
        (["--checkpoint_every", "-1"], "checkpoint_every = -1"),
        (["--seed", "99999999999999999999"], "seed = 9+: must be an integer in"),
        (["--model.hidden_dim", "1000000000000"], "model.hidden_dim = 1000000000000: must be a number in"),
        (["--model.width", "1000000"], "model.width = 1000000"),
        (["--model.projector_layers", "0"], "model.projector_layers = 0"),
        (["--data.workers", "100000"], "data.workers = 100000: must be a number in"),
        (["--data.prefetch", "0"], "data.prefetch = 0"),
        (["--optim.weight_decay=-1e-6"], "optim.weight_decay = -1e-06"),
        (["--optim.weight_decay", "-1e-6"], "optim.weight_decay: .*begins with a minus.*--optim.weight_decay=-1e-6"),
        (["--optim.momentum", ".nan"], "optim.momentum = nan"),
        (["--optim.trust_coefficient", ".inf"], "optim.trust_coefficient = inf"),
        (["--objective.beta", "-1"], "objective.beta = -1.0"),
        (["--objective.alpha", "0"], "objective.alpha = 0.0"),
        (["--objective.target", "momentum"], "objective.target = 'momentum': must be one of ema"),
        (["--objective.normalization", "l1"], "objective.normalization = 'l1': must be one of l2, layer_norm, batch_norm, none"),
        (
            ["--objective.normalization", "none", "--objective.beta", "1"],
            "normalization = 'none': must be 'l2' where objective.beta is above 0",
        ),
        (["--objective.predictor", "best"], "objective.predictor = 'best': must be one of network, least_squares"),
        (["--objective.predictor", "least_squares"], "model.predictor_layers = 2: must be 0 where objective.predictor is"),
        (["--optim.predictor_lr_factor=-1"], "optim.predictor_lr_factor = -1.0: must be a number in"),
        (["--optim.projector_lr_factor", ".nan"], "optim.projector_lr_factor = nan"),
        (
            ["--optim.predictor_lr_factor", "2", "--model.predictor_layers", "0"],
            "optim.predictor_lr_factor = 2.0: must be 1 where model.predictor_layers is 0",
        ),
        (["--views.mean", "[0.5, .nan, 0.5]"], "mean = .*nan"),
        (["--views.std", "[1, 0, 1]"], "std = .*three positive"),
        (["--views.view1.hue", "0.6"], "hue = 0.6"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_refused_in_one_line_that_names_the_option_and_the_value(arguments, says, tmp_path):
    arguments = [argument.format(tmp_path=tmp_path) for argument in arguments]
    preset = [] if arguments[0] == "--preset" else ["--preset", "r50_300ep"]
    with pytest.raises(UserError, match=says) as caught:
        _parse(*preset, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"optim: {base_lrr: 3}\n", r"optim.base_lrr: no such option \(did you mean optim.base_lr\?\)"),
        (b"epoch: 3\n", r"epoch: no such option \(did you mean epochs\?\)"),
        (b"optim: 3\n", "optim = 3: must be a group of options"),
        (b"epochs: -3\n", "epochs = -3.0: must be a number > 0"),
        (b"preset: r50_30ep\n", r"preset = 'r50_30ep': no such preset \(did you mean r50_300ep\?\)"),
        (b"epochs: [3\n", "run.yaml': is not YAML"),
        (b"\xff\xfe\x00", "run.yaml': is not YAML"),
        (b"- epochs\n", "run.yaml': must hold options"),
        (b"epochs\n", "run.yaml': must hold options"),
        (b"", "run.yaml': must hold options"),
    ],
)
def test_mistakes_in_a_file_are_refused_in_one_line_that_names_what_is_wrong(content, says, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says):
        _parse("--config", str(file))


def test_a_file_may_name_its_preset_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: r50_100ep\noptim: {base_lr: 0.5}\n")
    base = preset_config("r50_100ep")
    assert _parse("--config", str(file)) == replace(base, optim=replace(base.optim, base_lr=0.5))
    other = preset_config("r50_40ep")
    assert _parse("--config", str(file), "--preset", "r50_40ep") == replace(other, optim=replace(other.optim, base_lr=0.5))


def test_print_config_shows_a_config_that_can_be_read_back_and_refuses_the_mistakes_that_a_run_refuses(tmp_path, capsys):
    options = ("--preset", "cpu_demo", "--optim.base_lr", "0.125", "--views.view2.blur_p", "0.5")
    with pytest.raises(SystemExit) as ended:
        _parse(*options, "--print_config")
    assert ended.value.code == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert _parse("--config", str(file)) == _parse(*options)
    with pytest.raises(UserError, match="epochs = -1.0"):
        _parse("--print_config", "--epochs=-1")
    assert not capsys.readouterr().out


def test_plain_values_of_a_wrong_type_or_name_are_refused():
    with pytest.raises(UserError, match=r"optim.tau: no such option \(did you mean tau_base\?\)"):
        from_plain(TrainConfig, {"optim": {"tau": 0.9}})
    with pytest.raises(UserError, match="epochs = 'x': must be of type float"):
        from_plain(TrainConfig, {"epochs": "x"})
    with pytest.raises(UserError, match="global_batch = True"):
        from_plain(TrainConfig, {"global_batch": True})


@pytest.mark.parametrize(
    ("global_batch", "rank_batch", "ranks", "accumulate"), [(4096, 0, 8, 1), (4096, 128, 8, 4), (64, 64, 1, 1), (64, 16, 2, 2)]
)
def test_accumulation_follows_from_the_global_batch(global_batch, rank_batch, ranks, accumulate):
    assert accumulation_of(TrainConfig(global_batch=global_batch, rank_batch=rank_batch), world_size=ranks) == accumulate


@pytest.mark.parametrize(("global_batch", "rank_batch", "ranks"), [(64, 0, 3), (64, 48, 1), (64, 32, 4)])
def test_a_global_batch_that_does_not_split_is_refused(global_batch, rank_batch, ranks):
    with pytest.raises(UserError, match=f"global_batch = {global_batch}: not divisible"):
        accumulation_of(TrainConfig(global_batch=global_batch, rank_batch=rank_batch), world_size=ranks)


def test_help_says_what_each_option_means_and_its_value_in_the_preset(capsys):
    with pytest.raises(SystemExit) as caught:
        _parse("--preset", "cpu_demo", "--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    resume = "auto: continue the run in `out` if there is one, else start it; must: fail if there is none; never: fail if there is one."
    assert f"--resume RESUME {resume} (default: auto)" in text
    assert "Learning rate per 256 images: the peak is base_lr * global_batch / 256. (default: 8.0)" in text
    docs = field_docs(TrainConfig)
    assert docs["views.view1.hue"] == "HSV hue plus d turns, with d in [-hue, hue]."
    assert docs.keys() == flatten(to_plain(TrainConfig())).keys()
    assert "<class" not in text


def test_no_option_can_be_taken_for_one_of_torchruns():
    """torchrun parses abbreviations even after the script's name: a prefix of one of its options is swallowed, of two is 'ambiguous'."""
    from torch.distributed.run import get_args_parser

    theirs = [o for action in get_args_parser()._actions for o in action.option_strings if o.startswith("--")]
    ours = ["--preset", "--config", *(f"--{f.name}" for f in dataclasses.fields(TrainConfig))]
    assert not [(o, t) for o in ours for t in theirs if t.startswith(o)]


def test_the_papers_views_are_table_6():
    assert PAPER.view1 == ViewSpec()
    assert dataclasses.asdict(PAPER.view2) == {**dataclasses.asdict(PAPER.view1), "blur_p": 0.1, "solarize_p": 0.2}
    assert (PAPER.view1.blur_p, PAPER.view1.solarize_p, PAPER.view1.jitter_p, PAPER.view1.gray_p) == (1.0, 0.0, 0.8, 0.2)
    assert [blur_taps(s) for s in (224, 128, 96, 64, 32)] == [23, 13, 9, 7, 3]


def test_each_ablation_switches_off_what_its_name_says_and_nothing_else():
    def on(view: ViewSpec) -> set[str]:
        return {name for name in ("flip", "jitter", "gray", "blur", "solarize") if getattr(view, f"{name}_p") > 0}

    expected = {
        "no_flip": ({"jitter", "gray", "blur"}, {"jitter", "gray", "blur", "solarize"}),
        "no_blur": ({"flip", "jitter", "gray"}, {"flip", "jitter", "gray", "solarize"}),
        "no_colour": ({"flip", "blur"}, {"flip", "blur", "solarize"}),
        "no_jitter": ({"flip", "gray", "blur"}, {"flip", "gray", "blur", "solarize"}),
        "no_grayscale": ({"flip", "jitter", "blur"}, {"flip", "jitter", "blur", "solarize"}),
        "no_blur_in_view2": ({"flip", "jitter", "gray", "blur"}, {"flip", "jitter", "gray", "solarize"}),
        "no_solarize_in_view2": ({"flip", "jitter", "gray", "blur"}, {"flip", "jitter", "gray", "blur"}),
        "neither_in_view2": ({"flip", "jitter", "gray", "blur"}, {"flip", "jitter", "gray"}),
        "symmetric": ({"flip", "jitter", "gray", "blur", "solarize"},) * 2,
        "crop_only": (set(), set()),
        "crop_flip": ({"flip"}, {"flip"}),
        "crop_colour": ({"jitter", "gray"}, {"jitter", "gray"}),
        "crop_blur": ({"blur"}, {"blur"}),
    }
    assert {name: (on(pair.view1), on(pair.view2)) for name, pair in ABLATIONS.items()} == expected
    assert ABLATIONS["symmetric"].view1 == ABLATIONS["symmetric"].view2
    assert ABLATIONS["symmetric"].view1.blur_p == 0.5


def test_entry_points_print_one_line_and_exit_with_2_only_for_a_users_mistake(capsys):
    @one_line_errors
    def fails(error):
        raise error

    with pytest.raises(SystemExit) as caught:
        fails(UserError("a = 1: must be\n2"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "fastbyol: error: a = 1: must be 2\n"
    with pytest.raises(KeyError):
        fails(KeyError("a bug"))
