"""Weights files of other programs: each layout's real names, found, loaded and reported key by key; what is not one ends in one line."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from golden_weights import DebiasedStatistics, encoder_name, regenerated, torch_layout
from safetensors.torch import save_file
from torch import nn

from fastbyol import load_encoder
from fastbyol.__main__ import main as fastbyol_command
from fastbyol.config.errors import UserError
from fastbyol.export import match_encoder
from fastbyol.models import build_encoder
from fastbyol.run.checkpoint import checkpoint_path, load_checkpoint
from fastbyol.run.foreign_weights import load_run_or_weights
from fastbyol.train import main as train_command
from tests.commands import ROOT, SMALL_RUN
from tests.images import smooth_image
from tests.test_documented_commands import python_blocks

GOLDEN = Path(__file__).parent / "golden"


def _varied(module: nn.Module) -> nn.Module:
    """Gives every tensor values of its own: a new network's batch norms are all alike, so a swap of two would not be seen."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -0.5
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return module.eval()


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()  # type: ignore[assignment]
    return _varied(network)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _prefixed(state: dict[str, torch.Tensor], prefix: str, factor: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value * factor if value.is_floating_point() else value for name, value in state.items()}


def _heads(*names: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.zeros(4, 4) for name in names}


def _lightly_example(network: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of lightly's BYOL example: backbone = nn.Sequential(*list(resnet.children())[:-1])."""
    backbone = nn.Sequential(*list(network.children())[:-1])
    momentum = _prefixed(backbone.state_dict(), "backbone_momentum.", 2)
    return _prefixed(backbone.state_dict(), "backbone.") | _heads("projection_head.layers.0", "prediction_head.layers.0") | momentum


LAYOUTS = {
    "torchvision": lambda net: net.state_dict() | {"fc.weight": torch.zeros(9, 512), "fc.bias": torch.zeros(9)},
    "DDP": lambda net: {"state_dict": _prefixed(net.state_dict(), "module.")},
    # Lightning's file: callbacks, loops and hyper-parameters beside the weights; the trained backbone first.
    "solo-learn": lambda net: {
        "epoch": 3,
        "global_step": 99,
        "pytorch-lightning_version": "2.1.2",
        "state_dict": _prefixed(net.state_dict(), "backbone.")
        | _heads("classifier", "projector.0", "predictor.0")
        | _prefixed(net.state_dict(), "momentum_backbone.", 2)
        | _heads("momentum_projector.0"),
        "hyper_parameters": {"method": "byol", "lr": 0.1},
    },
    "lightly's benchmark": lambda net: {
        "state_dict": _prefixed(net.state_dict(), "backbone.")
        | _heads("projection_head.layers.0")
        | _prefixed(net.state_dict(), "teacher_backbone.", 2)
    },
    "student_backbone": lambda net: _prefixed(net.state_dict(), "student_backbone.") | _prefixed(net.state_dict(), "teacher_backbone.", 2),
    "lightly's example": _lightly_example,
    "MoCo": lambda net: {
        "arch": "resnet18",
        "state_dict": _prefixed(net.state_dict(), "module.encoder_q.") | _prefixed(net.state_dict(), "module.encoder_k.", 2),
    },
    # vissl/models/trunks/resnext.py and extra_scripts/convert_vissl_to_torchvision.py.
    "VISSL": lambda net: {
        "phase_idx": 100,
        "classy_state_dict": {
            "train": True,
            "base_model": {
                "meters": {},
                "model": {"trunk": _prefixed(net.state_dict(), "_feature_blocks."), "heads": _heads("0.clf.0", "0.clf.2")},
            },
            "optimizer": {"optim": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}},
        },
    },
    # mmselfsup/models/algorithms/byol.py of version 1: the target is CosineEMA(nn.Sequential(backbone, neck)).
    "mmselfsup": lambda net: {
        "meta": {"epoch": 200},
        "state_dict": {"target_net.steps": torch.tensor(5)}
        | _prefixed(net.state_dict(), "target_net.module.0.", 2)
        | _prefixed(net.state_dict(), "backbone.")
        | _heads("neck.fc0", "head.predictor.fc0", "target_net.module.1.fc0"),
    },
    # The same of version 0: online_net and target_net are nn.Sequential(backbone, neck), and backbone is a part of the first.
    "mmselfsup 0": lambda net: {
        "state_dict": _prefixed(net.state_dict(), "target_net.0.", 2)
        | _prefixed(net.state_dict(), "online_net.0.")
        | _prefixed(net.state_dict(), "backbone.")
        | _heads("online_net.1.fc0", "target_net.1.fc0"),
    },
    # mmselfsup/tools/model_converters/extract_backbone_weights.py.
    "mmselfsup's extracted backbone": lambda net: {"state_dict": net.state_dict(), "author": "MMSelfSup"},
    # A network and its average under keys of their own, the average first.
    "timm's averaged": lambda net: {"epoch": 3, "state_dict_ema": _prefixed(net.state_dict(), "", 2), "state_dict": net.state_dict()},
    "DINO": lambda net: {
        "teacher": _prefixed(net.state_dict(), "backbone.", 2) | _heads("head.mlp.0"),
        "student": _prefixed(net.state_dict(), "module.backbone.") | _heads("module.head.mlp.0"),
    },
}
OUTSIDE = {
    "VISSL": {"classy_state_dict.base_model.model.heads.*": 2, "classy_state_dict.optimizer.*": 1},
    "timm's averaged": {"state_dict_ema.*": 120},
    "DINO": {"teacher.*": 121},
}
"""Tensors of each layout that are under another key than the encoder's, as `weights` reports them."""


def _main_tensors(state: dict) -> dict[str, torch.Tensor]:
    """The named tensors of a layout that are beside the encoder's own."""
    if "classy_state_dict" in state:
        return state["classy_state_dict"]["base_model"]["model"]["trunk"]
    return state.get("student", state.get("state_dict", state))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_encoder_of_each_layout_is_found_and_gives_the_features_it_gave_there(layout, suffix, resnet18, image, tmp_path):
    state = LAYOUTS[layout](resnet18)
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        state = _main_tensors(state)
        save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    run = load_run_or_weights(path)
    assert (run.config.model.encoder, run.config.model.stem, run.config.views.size_px) == ("resnet18", "imagenet", 224)
    encoder = load_encoder(path)
    with torch.no_grad():
        want = resnet18(image)
        assert (encoder(image) - want).abs().max() <= 1e-5 * want.abs().max()
    # Every key of the file is accounted for, once; those under other keys by their number.
    found = match_encoder(run)[1]
    tensors, outside = _main_tensors(state), OUTSIDE.get(layout, {}) if suffix == "pth" else {}
    assert sorted([*found.taken.values(), *found.left_out]) == sorted(tensors)
    lines = list(found.lines())
    assert len(lines) == len(tensors) + len(outside)
    assert {line.split()[0]: int(line.split("left out: ")[1].split()[0]) for line in lines if ".*" in line} == outside
    assert set(found.taken) == set(encoder.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_timms_resnets_are_found_by_their_shapes(name, tmp_path):
    torch.manual_seed(0)
    theirs = _varied(timm.create_model(name, pretrained=False, num_classes=7))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    encoder = load_encoder(tmp_path / "w.pth")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(encoder(x) / want.abs().max(), want / want.abs().max(), rtol=1e-3, atol=1e-4)


def test_another_of_timms_models_is_loaded_by_its_name(tmp_path):
    theirs = timm.create_model("resnet18d", pretrained=False, num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="no encoder found among its .* give model.encoder timm/NAME"):
        load_encoder(tmp_path / "w.pth")
    encoder = load_encoder(tmp_path / "w.pth", changes={"model.encoder": "timm/resnet18d", "views.size_px": 64})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), theirs.forward_head(theirs.forward_features(x), pre_logits=True))
    assert encoder.preprocess(smooth_image(0, 80, 90)).shape == (1, 3, 64, 64)  # type: ignore[operator]


def test_a_classifier_inside_a_head_that_the_encoder_has_is_left_out(tmp_path):
    theirs = timm.create_model("convnext_atto", pretrained=False, num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    run = load_run_or_weights(tmp_path / "w.pth", changes={"model.encoder": "timm/convnext_atto", "views.size_px": 32})
    assert set(match_encoder(run)[1].left_out) == {"head.fc.weight", "head.fc.bias"}


class _LightlyBlock(nn.Module):
    """A basic block with the names of lightly/models/resnet.py."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class _LightlyResNet(nn.Module):
    """ResNetGenerator('resnet-18'): a 3x3 first convolution of stride 1, no max-pool, no module for ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        channels_in = 64
        for group, channels in enumerate((64, 128, 256, 512), start=1):
            stride = 1 if group == 1 else 2
            blocks = [_LightlyBlock(channels_in, channels, stride), _LightlyBlock(channels, channels, 1)]
            self.add_module(f"layer{group}", nn.Sequential(*blocks))
            channels_in = channels
        self.linear = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        for group in range(1, 5):
            x = self.get_submodule(f"layer{group}")(x)
        return x.mean(dim=(2, 3))


@pytest.mark.parametrize("sequential", [True, False])
def test_lightlys_own_resnet_is_found_numbered_and_named(sequential, tmp_path, caplog):
    torch.manual_seed(0)
    theirs = _varied(_LightlyResNet())
    backbone = nn.Sequential(*list(theirs.children())[:-1], nn.AdaptiveAvgPool2d(1)) if sequential else theirs
    torch.save({"state_dict": _prefixed(backbone.state_dict(), "backbone.")}, tmp_path / "w.ckpt")
    encoder = load_encoder(tmp_path / "w.ckpt", changes={"views.size_px": 32})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert "its first convolution is 3x3 and taken to have stride 1" in caplog.text


def _official_file(path: Path) -> tuple[dict[str, torch.Tensor], np.lib.npyio.NpzFile]:
    """Writes the official ResNet-50 of the golden file as docs/guide.md flattens DeepMind's checkpoints; returns its parameters."""
    golden = np.load(GOLDEN / "net_resnet50_65px.npz")
    arrays, parameters = {}, {}
    for name, value in regenerated(golden):
        arrays[name.replace("|", "/")] = value
        parameters[encoder_name(name)] = torch_layout(value)
        if name.endswith("|scale"):
            module = name.removesuffix("|scale")
            for kind in ("mean", "var"):
                average = np.abs(value) if kind == "var" else value / 7
                ema = f"{module}/~/{kind}_ema"
                arrays |= {f"{ema}/average": average, f"{ema}/hidden": average, f"{ema}/counter": np.array(5)}
    arrays |= {"projector/linear/w": np.zeros((4, 4), np.float32), "classifier/b": np.zeros(4, np.float32)}
    np.savez(path, **arrays)
    return parameters, golden


def _after_a_step(official: Path, path: Path, state: dict[str, torch.Tensor]) -> None:
    """Writes the file with the running statistics of a state dict, each tree of the checkpoint in front, and a part of the target network."""
    arrays = {}
    for name, value in np.load(official).items():
        tree = "state" if "_ema/" in name else "params"
        if found := re.fullmatch(r"(.*)/~/(mean|var)_ema/average", name):
            ours = encoder_name(f"{found[1]}|scale").replace("weight", f"running_{found[2]}")
            value = state[ours].numpy().reshape(value.shape)
        if "initial" in name:
            arrays[f"target_{tree}/{name}"] = 2 * value
        arrays[f"online_{tree}/{name}"] = value
    np.savez(path, **arrays)


def test_the_official_weights_are_read_from_an_npz_of_haikus_names(tmp_path):
    parameters, golden = _official_file(tmp_path / "byol.npz")
    run = load_run_or_weights(tmp_path / "byol.npz")
    assert (run.config.model.encoder, run.config.model.padding, run.config.views.antialias) == ("resnet50", "same", False)
    named = load_run_or_weights(tmp_path / "byol.npz", changes={"model.encoder": "resnet50"}).config
    assert (named.model.padding, named.views) == ("same", run.config.views), "also where the encoder is given"
    encoder = load_encoder(tmp_path / "byol.npz")
    loaded = dict(encoder.named_parameters())
    assert loaded.keys() == parameters.keys()
    for name, value in parameters.items():
        assert torch.equal(loaded[name], value.reshape(loaded[name].shape)), name
    state = encoder.state_dict()
    torch.testing.assert_close(state["layer2.0.downsample.1.running_mean"], state["layer2.0.downsample.1.weight"] / 7)
    torch.testing.assert_close(state["layer4.2.bn3.running_var"], state["layer4.2.bn3.weight"].abs())
    # The official network's own output for its batch, with statistics of the batch.
    x = torch.tensor(np.random.RandomState(golden["x_seed"]).standard_normal(golden["x_shape"]).astype(np.float32)).permute(0, 3, 1, 2)
    statistics = DebiasedStatistics(encoder)
    out = encoder.train()(x).detach().numpy()
    assert np.linalg.norm(out - golden["train_out_0"]) <= 6e-4 * np.linalg.norm(golden["train_out_0"])
    # And its features, with the averages that its state then holds, read from the file like the rest.
    statistics.install(calls=1)
    _after_a_step(tmp_path / "byol.npz", tmp_path / "after.npz", encoder.state_dict())
    loaded_after = load_encoder(tmp_path / "after.npz")
    with torch.no_grad():
        feature, source = loaded_after(x), encoder.eval()(x)
    assert (feature - source).abs().max() <= 1e-5 * source.abs().max()
    assert np.linalg.norm(feature.numpy() - golden["eval_out_0_after"]) <= 6e-4 * np.linalg.norm(golden["eval_out_0_after"])
    after = {line.split()[0]: line for line in match_encoder(load_run_or_weights(tmp_path / "after.npz"))[1].lines()}
    assert after["target_params/r/~/initial_conv/w"].endswith("left out: of another network in the file")
    lines = list(match_encoder(run)[1].lines())
    assert any(
        line.split()
        == ["projector/linear/w", *["left", "out:", "a", "head", "or", "another", "part", "that", "the", "encoder", "does", "not", "have"]]
        for line in lines
    )
    assert any("initial_conv/w" in line and line.endswith("taken as conv1.weight") for line in lines)
    assert any(line.endswith("left out: Haiku's own counter") for line in lines)


def test_the_guides_lines_make_an_npz_of_deepminds_checkpoint(tmp_path, monkeypatch):
    import pickle
    import types

    _official_file(tmp_path / "wanted.npz")
    wanted = dict(np.load(tmp_path / "wanted.npz"))
    trees: dict[str, dict[str, dict[str, np.ndarray]]] = {"online_params": {}, "online_state": {}}
    for name, value in wanted.items():
        module, _, leaf = name.rpartition("/")
        trees["online_state" if "_ema/" in name else "online_params"].setdefault(module, {})[leaf] = value
    state = types.SimpleNamespace(**trees, target_params={}, target_state={})
    (tmp_path / "pretrain_res50x1.pkl").write_bytes(pickle.dumps({"step": 1, "experiment_state": state}))
    (block,) = (each for each in python_blocks(ROOT / "docs" / "guide.md") if "dill" in each)
    monkeypatch.setitem(sys.modules, "dill", pickle)  # dill loads more than pickle, which is all that this file needs
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/guide.md", "exec"), {})  # fixed text of this repository
    made = np.load(tmp_path / "byol.npz")
    assert set(made.files) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(made[name], value, err_msg=name)


def test_a_pickle_is_not_opened_and_the_way_out_is_said(tmp_path):
    import pickle

    (tmp_path / "pretrain_res50x1.pkl").write_bytes(pickle.dumps({"step": 1, "experiment_state": print}))
    with pytest.raises(UserError, match="a pickle can run code, so it is not read: docs/guide.md shows how to make an .npz"):
        load_encoder(tmp_path / "pretrain_res50x1.pkl")


class _Settings:
    """Stands for what Lightning files hold beside tensors."""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"state_dict": {"a": torch.zeros(2)}}, "no encoder found among its 1 tensors .the first: a."),
        ({"epoch": 3}, "is not a state dict"),
        (torch.zeros(3), "is not a state dict"),
        ({"state_dict": {}, "hyper_parameters": _Settings()}, r"save its weights alone: torch.save\(torch.load\(FILE"),
    ],
)
def test_files_without_an_encoder_end_in_one_line(content, says, tmp_path):
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=says):
        load_encoder(tmp_path / "w.ckpt")


def test_networks_that_we_do_not_build_are_refused_not_half_loaded(tmp_path):
    for name in ("wide_resnet50_2", "resnext50_32x4d"):
        torch.save(getattr(torchvision.models, name)().state_dict(), tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"holds other networks \(layer1.0.conv1.weight is"):
            load_encoder(tmp_path / "w.pth")
    torch.save({f"{'x.' if 'conv2' in k else ''}{k}": v for k, v in torchvision.models.resnet18().state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="it has no layer1.0.conv2.weight"):
        load_encoder(tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="is not a file of weights"):
        load_encoder(tmp_path / "w.safetensors")
    (tmp_path / "w.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match="is not an .npz of arrays"):
        load_encoder(tmp_path / "w.npz")


def test_a_damaged_file_says_so_in_words_and_no_option_is_offered_that_does_not_help(tmp_path):
    weights = build_encoder("resnet8").state_dict()
    torch.save(weights, tmp_path / "whole.pth")
    np.savez(tmp_path / "whole.npz", **{name: value.numpy() for name, value in weights.items()})
    for suffix in ("pth", "npz"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        (tmp_path / f"text.{suffix}").write_text("hello")
        (tmp_path / f"noise.{suffix}").write_bytes(np.random.default_rng(0).bytes(5000))
        with zipfile.ZipFile(tmp_path / f"other.{suffix}", "w") as archive:
            archive.writestr("readme.txt", "no weights")
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] * math.nan}, tmp_path / "nan.pth")
    torch.save({name: value for name, value in weights.items() if name != "layer2.0.conv2.weight"}, tmp_path / "lack.pth")
    refusals = {
        **{f"{name}.pth": r"is not a file of weights \(torch.save did not write it\)$" for name in ("text", "noise", "other")},
        **{f"{name}.npz": r"is not an .npz of arrays \(np.savez did not write it\)$" for name in ("text", "noise")},
        "other.npz": "is not a state dict",
        "cut.pth": r"is not a file of weights \(it is cut short or damaged; copy it again\)$",
        "cut.npz": r"is not an .npz of arrays \(it is cut short or damaged; copy it again\)$",
        "nan.pth": r"conv1.weight holds numbers that are not finite: its training diverged, or the file is damaged; take another file$",
        "lack.pth": r"is not complete \(it has no layer2.0.conv2.weight\); take a file with the whole network$",
    }
    for name, why in refusals.items():
        with pytest.raises(UserError, match=why) as caught:
            load_encoder(tmp_path / name)
        assert name in str(caught.value)


def test_wider_networks_and_other_depths_are_found(tmp_path):
    for name, width, stem in (("resnet18", 2, "imagenet"), ("resnet8", 1, "small2"), ("resnet8", 2, "small")):
        torch.save(build_encoder(name, width=width, stem=stem).state_dict(), tmp_path / "w.pt")
        model = load_run_or_weights(tmp_path / "w.pt").config.model
        assert (model.encoder, model.width, model.stem) == (name, width, "imagenet" if stem == "imagenet" else "small")


def test_options_that_weights_do_not_have_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"views.size: is not an option of weights \(did you mean views.size_px\?\)"):
        load_encoder(tmp_path / "w.pth", changes={"views.size": 32})
    with pytest.raises(UserError, match=r"views.size_px = 0"):
        load_encoder(tmp_path / "w.pth", changes={"views.size_px": 0})


def test_safetensors_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors is not installed; pip install 'fastbyol.safetensors.'"):
        load_encoder(tmp_path / "w.safetensors")


# The commands.


@pytest.mark.parametrize("layout", ["solo-learn", "lightly's example"])
def test_a_run_starts_from_the_weights_of_each_program(layout, data_paths, tmp_path, capsys):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()  # type: ignore[assignment]
    torch.save(LAYOUTS[layout](theirs), tmp_path / "w.ckpt")
    options = ["--model.encoder", "resnet18", "--model.stem", "imagenet", "--epochs", "0.4", "--optim.tau_base", "1"]  # one step of rate 0
    arguments = [*SMALL_RUN, *options, "--data.train", str(data_paths["folder"])]
    train_command([*arguments, "--init_from", str(tmp_path / "w.ckpt"), "--out", str(tmp_path / "run")])
    got = load_checkpoint(checkpoint_path(tmp_path / "run", 1))["byol"]
    for name, value in theirs.state_dict().items():
        if value.is_floating_point() and "running" not in name:
            assert torch.equal(got[f"target.encoder.{name}"], value), name
    assert "loads 120 tensors" in capsys.readouterr().err


def test_evaluate_and_weights_take_them_from_the_command_line(resnet18, image_folder, tmp_path, capsys):
    torch.save(LAYOUTS["torchvision"](resnet18), tmp_path / "tv.pth")
    for split in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(image_folder)
    arguments = ["--checkpoint", str(tmp_path / "tv.pth"), "--data", str(tmp_path / "data"), "--views.size_px", "32", "--workers", "1"]
    fastbyol_command(["evaluate", "knn", *arguments, "--k", "1"])
    said = capsys.readouterr()
    assert "weights tv.pth" in said.out
    assert "knn: weights tv.pth" in said.err
    fastbyol_command(["evaluate", "labelfree", *arguments])
    free = capsys.readouterr()
    assert "two views each of 25 images: weights tv.pth and untrained encoder" in free.err
    assert "byol" not in (said.out + said.err + free.out + free.err).lower().replace("fastbyol", "")
    assert "tv.pth': resnet18, images of 32 px, loads 120 tensors, but not 'fc' in the same file" in said.err
    record = json.loads((tmp_path / "tv.evaluation" / "knn.json").read_text())
    # The nearest neighbour of each image of val is itself in train.
    assert record["scores"]["byol"]["top1"] == 1.0
    fastbyol_command(["weights", str(tmp_path / "tv.pth"), "--views.size_px", "32"])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == ["conv1.weight", "taken"]
    assert [line.split()[0] for line in lines if "left out" in line] == ["fc.weight", "fc.bias"]
    assert lines[-1] == "encoder: resnet18, width 1, stem imagenet, padding symmetric; images of 32 px"
    assert not said.err


def test_weights_refuses_what_every_command_refuses_after_the_lines_of_the_keys(tmp_path, capsys):
    state = torchvision.models.resnet18().state_dict() | {"layer1.0.se.weight": torch.zeros(1)}
    state["layer1.0.conv2.weight"] = torch.zeros(64, 64, 1, 1)
    del state["layer2.0.bn1.running_mean"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(SystemExit) as ended:
        fastbyol_command(["weights", str(tmp_path / "w.pth")])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert re.search(r"^layer2.0.bn1.running_mean +missing: the encoder cannot be loaded without it$", said.out, re.M)
    assert "loads" not in said.out
    for complaint in (
        "it has no layer2.0.bn1.running_mean",
        "layer1.0.se.weight is unknown here",
        "layer1.0.conv2.weight is (64, 64, 1, 1)",
    ):
        assert complaint in said.err


def test_weights_are_a_baseline_of_a_run_at_their_own_size(resnet18, image_folder, tmp_path, capsys):
    torch.save(LAYOUTS["torchvision"](resnet18), tmp_path / "tv.pth")
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(image_folder)
    train_command([*SMALL_RUN, "--epochs", "1", "--data.train", str(image_folder), "--out", str(run)])
    options = ["--data", str(data), "--workers", "1", "--k", "3"]
    fastbyol_command(["evaluate", "knn", "--checkpoint", str(tmp_path / "tv.pth"), "--views.size_px", "48", *options])
    alone = json.loads((tmp_path / "tv.evaluation" / "knn.json").read_text())["scores"]["byol"]
    capsys.readouterr()
    beside = ["--checkpoint", str(run), "--compare", str(tmp_path / "tv.pth"), "--views.size_px", "48"]
    fastbyol_command(["evaluate", "knn", *beside, *options])
    said = capsys.readouterr()
    record = json.loads((run / "evaluation" / "knn.json").read_text())
    name = "weights tv.pth, baseline"
    assert list(record["scores"]) == ["byol", "untrained", "pca", name]
    assert (record["scores"][name]["top1"], record["scores"][name]["feature_dim"]) == (alone["top1"], 512)
    assert record["comparisons"][name]["difference"] == pytest.approx(record["scores"]["byol"]["top1"] - alone["top1"])
    assert f"than {name}" in said.out
    assert [line.split("  ")[1].strip() for line in said.out.splitlines() if "128" in line or "512" in line][-1] == name
    fastbyol_command(["evaluate", "knn", "--checkpoint", str(run), *options])
    assert len(list((run / "evaluation").glob("knn*.json"))) == 2, "a result without the baseline has a file of its own"
    with pytest.raises(SystemExit, match="2"):
        fastbyol_command(["evaluate", "labelfree", *beside, *options[:2]])
    assert "--compare: has no effect on labelfree" in capsys.readouterr().err


def test_a_network_is_unchanged_by_its_way_through_a_file_of_ours(tmp_path):
    torch.manual_seed(0)
    network = build_encoder("resnet8", stem="small2").eval()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    encoder = load_encoder(tmp_path / "w.pt", changes={"views.size_px": 32, "model.stem": "small2"})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(x), copy.deepcopy(network)(x))
