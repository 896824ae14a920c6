"""What `export` writes is loaded by the program that it is for, with every key and the same features; the card says what it is."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from torch import Tensor, nn

from fastbyol import load_encoder
from fastbyol.__main__ import main as fastbyol_command
from fastbyol.byol import build_byol
from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.evaluation.embedding import weights_digest
from fastbyol.evaluation.result_file import ProtocolResult, SubjectScore, write_result
from fastbyol.exports.card import collect_facts, source_name
from fastbyol.exports.check import CheckImages, generated_images
from fastbyol.exports.detectron2_weights import detectron2_name
from fastbyol.exports.format import Subject
from fastbyol.exports.graph import folded
from fastbyol.exports.registry import format_named, formats_for
from fastbyol.exports.writing import places, write_exports
from fastbyol.models import build_encoder
from fastbyol.models.resnet import BasicBlock, Bottleneck, ResNet
from fastbyol.run.checkpoint import checkpoint_path, checkpoint_steps, load_run, save_checkpoint
from fastbyol.run.foreign_weights import load_run_or_weights
from fastbyol.run.initial_weights import load_initial_weights
from tests.commands import ROOT, files_no_larger_than
from tests.test_foreign_weights import _varied

SIZE_PX = 64
KEYED = ("torchvision", "timm", "safetensors", "huggingface", "detectron2")
PROGRAMS = ("onnx", "torch_export")


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """torchvision's own ResNet-18, whose features every format must give."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()  # type: ignore[assignment]
    return _varied(network)


@pytest.fixture(scope="module")
def exported(source: nn.Module, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that network in every format that keeps its keys."""
    folder = tmp_path_factory.mktemp("exports")
    torch.save(source.state_dict(), folder / "resnet18.pth")
    options = ["--data", str(image_folder), "--views.size_px", str(SIZE_PX), "--licence", "cc-by-4.0"]
    fastbyol_command(["export", "--checkpoint", str(folder / "resnet18.pth"), "--to", *KEYED, "--out", str(folder / "all"), *options])
    return folder / "all"


@pytest.fixture(scope="module")
def run8(colours_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours, of a ResNet-8, with the result of an evaluation, and one of an earlier checkpoint."""
    folder = tmp_path_factory.mktemp("own") / "run"
    folder.mkdir()
    for name in ("checkpoints", "config.yaml"):
        (folder / name).symlink_to(colours_run / name)
    run = load_run(folder)
    score = SubjectScore(top1=0.5, top5=0.875, feature_dim=128, seconds=1.0)
    result = ProtocolResult("knn", {"byol": score}, num_train=72, num_val=24, num_classes=3, chance_top1=0.3, settings={})
    write_result(result, run.results, data="/home/someone/photos", step=run.step)
    write_result(dataclasses.replace(result, protocol="linear"), run.results, data="/home/someone/photos", step=run.step - 1)
    return folder


@pytest.fixture(scope="module")
def exported_run(run8: Path) -> Path:
    """A folder with the encoder of that run in every format that can hold it, next to the run."""
    fastbyol_command(["export", "--checkpoint", str(run8), "--to", "all", "--out", str(run8.parent / "all")])
    return run8.parent / "all"


def _card(folder: Path, name: str) -> str:
    format = format_named(name)
    return (folder / format.file / "README.md" if format.is_folder else folder / f"{format.file}.md").read_text()


def _loads(card: str) -> list[str]:
    block = re.search(r"## Load it\n```\w+\n(.*?)\n```", card, flags=re.DOTALL)
    assert block
    return block[1].splitlines()


def _near(got: Tensor, want: Tensor, *, limit: float) -> bool:
    return bool((got - want).abs().max() <= limit * max(1.0, want.abs().max().item()))


def _feature_by(lines: list[str], images: object) -> Tensor:
    """Runs the lines of a card as a user would paste them, and returns the feature."""
    names: dict[str, object] = {"images": images}
    with torch.no_grad():
        exec("\n".join(lines), names)
    return torch.as_tensor(names["feature"])


@pytest.mark.parametrize("name", ["torchvision", "timm", "huggingface"])
def test_the_three_lines_of_a_card_load_it_and_give_the_features_of_the_source(name, source, exported, monkeypatch):
    monkeypatch.chdir(exported)
    lines, images = _loads(_card(exported, name)), torch.randn(3, 3, SIZE_PX, SIZE_PX)
    assert len(lines) == 3
    with torch.no_grad():
        assert _near(_feature_by(lines, images), source(images), limit=1e-5)


@pytest.mark.parametrize(("name", "limit"), [("onnx", 1e-4), ("torch_export", 1e-5)])
def test_programs_take_any_number_of_images_and_give_the_features_of_the_run(name, limit, run8, exported_run, monkeypatch):
    monkeypatch.chdir(exported_run)
    encoder, lines = load_encoder(run8), _loads(_card(exported_run, name))
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        feature = _feature_by(lines, images.numpy() if name == "onnx" else images)
        with torch.no_grad():
            assert _near(feature, encoder(images), limit=limit)


def test_torchvision_and_timm_miss_no_key_but_the_classifiers(exported):
    held = torch.load(exported / "torchvision.pth", weights_only=True)
    found = torchvision.models.resnet18().load_state_dict(held, strict=False)
    assert (set(found.missing_keys), found.unexpected_keys) == ({"fc.weight", "fc.bias"}, [])
    for path in (exported / "timm.safetensors", exported / "huggingface" / "model.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
        found = timm.create_model("resnet18", pretrained=False).load_state_dict(tensors, strict=False)
        assert (set(found.missing_keys), found.unexpected_keys) == ({"fc.weight", "fc.bias"}, [])
    model = timm.create_model(f"local-dir:{exported / 'huggingface'}", pretrained=True, num_classes=0)
    settings = timm.data.resolve_model_data_config(model)
    assert (list(settings["input_size"]), list(settings["mean"]), settings["crop_pct"]) == (
        [3, SIZE_PX, SIZE_PX],
        [0.485, 0.456, 0.406],
        0.875,
    )


def test_safetensors_say_themselves_how_to_build_the_encoder(source, exported, image_folder):
    encoder = load_encoder(exported / "encoder.safetensors")
    image = encoder.preprocess(image_folder / "ant" / "000.jpg")  # type: ignore[operator]
    assert image.shape == (1, 3, SIZE_PX, SIZE_PX)
    with torch.no_grad():
        assert _near(encoder(image), source(image), limit=1e-5)
    for path in (exported / "huggingface", exported / "timm.safetensors"):
        assert load_encoder(path).preprocess.views.size_px == SIZE_PX  # type: ignore[union-attr]


def _detectron2_names() -> set[str]:
    """The parameters of detectron2's ResNet-18, written down from modeling/backbone/resnet.py: stem, res2 to res5, conv{n}, shortcut, norm."""
    convolutions = ["stem.conv1"]
    for stage in (2, 3, 4, 5):
        convolutions += [f"res{stage}.{block}.conv{number}" for block in (0, 1) for number in (1, 2)]
        convolutions += [f"res{stage}.0.shortcut"] if stage > 2 else []
    norms = [
        f"{name}.norm.{leaf}" for name in convolutions for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    return {*norms, *(f"{name}.weight" for name in convolutions)}


def test_detectron2s_file_has_the_names_of_its_backbone(source, exported):
    held = pickle.loads((exported / "detectron2.pkl").read_bytes())
    assert (held["__author__"], held["matching_heuristics"], set(held["model"])) == ("fastbyol", True, _detectron2_names())
    assert (torch.from_numpy(held["model"]["res3.0.shortcut.norm.weight"]) == source.state_dict()["layer2.0.downsample.1.weight"]).all()
    assert detectron2_name("layer4.2.bn3.running_var") == "res5.2.conv3.norm.running_var"
    card = _card(exported, "detectron2")
    assert "Not loaded in detectron2" in card
    assert 'MODEL: {WEIGHTS: "detectron2.pkl", ' in card  # quoted: a name with a comma is one name in YAML too
    assert "PIXEL_STD: [58.395, 57.12, 57.375]" in card


def test_every_card_has_the_check_and_no_file_has_a_path_of_this_machine(exported, exported_run, image_folder, run8, colours_run):
    for folder, names, data in ((exported, KEYED, r"images\d"), (exported_run, ("safetensors", *PROGRAMS), r"colours\d/train")):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) == 2 * len(names) + (1 if folder == exported else 0)
        for name in names:
            card = _card(folder, name)
            assert re.search(rf"largest difference in a feature is [\d.e-]+, and the largest feature .* \(8 images of {data}\)", card), card
        for path in files:
            assert not any(str(each).encode() in path.read_bytes() for each in (ROOT, image_folder, run8, colours_run.parent)), path
            assert path.stat().st_mode & 0o444 == 0o444, "others may read it"
    assert "Of these weights: cc-by-4.0." in _card(exported, "timm")
    assert "\nlicense: cc-by-4.0\n" in _card(exported, "huggingface")


# A run of ours.


def test_a_card_has_no_scores_of_weights_that_were_in_the_file_before(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    run = load_run_or_weights(tmp_path / "w.pth", changes={"views.size_px": SIZE_PX})
    score = SubjectScore(top1=0.5, top5=0.875, feature_dim=512, seconds=1.0)
    result = ProtocolResult("knn", {"byol": score}, num_train=72, num_val=24, num_classes=3, chance_top1=0.3, settings={})
    write_result(result, run.results, data="photos", step=0, inputs=f"{weights_digest(load_encoder(tmp_path / 'w.pth'))} data")

    def scores():
        run = load_run_or_weights(tmp_path / "w.pth", changes={"views.size_px": SIZE_PX})
        encoder = load_encoder(tmp_path / "w.pth")
        return collect_facts(run, Subject(encoder, run.config), licence="unknown")["scores"]

    assert [each["task"] for each in scores()] == ["knn"]
    torch.save({name: value * 2 if value.is_floating_point() else value for name, value in source.state_dict().items()}, tmp_path / "w.pth")
    assert scores() == []


def test_the_card_of_a_run_says_what_it_was_trained_on_and_what_it_scored(run8, exported_run):
    card, step = _card(exported_run, "safetensors"), load_run(run8).step
    with safe_open(exported_run / "encoder.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["fastbyol"])
    assert re.search(r"data: 72 images of `colours\d/train`, without labels", card)
    assert f"{step} steps of 8 images, 2.0 epochs" in card
    assert "  - this encoder: top-1 50.0 %, top-5 87.5 %" in card
    assert facts["scores"] == [{"task": "knn", "data": "photos", "figures": {"byol": {"top-1 %": 50.0, "top-5 %": 87.5}}}]
    assert "Of these weights: not stated: ask the author." in card
    assert (facts["check"]["largest_difference"], facts["input"]["size_px"]) == (0.0, 32)
    assert "/home/someone" not in card + json.dumps(facts)
    program = onnx.load(exported_run / "encoder.onnx")
    assert json.loads(program.metadata_props[0].value)["training"] == facts["training"]
    assert "BatchNormalization" not in {node.op_type for node in program.graph.node}
    stored = {"fastbyol.json": ""}
    torch.export.load(exported_run / "encoder.pt2", extra_files=stored)
    assert json.loads(stored["fastbyol.json"])["training"] == facts["training"]


def test_what_an_export_says_of_itself_is_enough_to_load_it_and_to_start_a_run_from_it(run8, exported_run, tmp_path):
    out, run, x = exported_run / "encoder.safetensors", load_run(run8), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert _near(load_encoder(out)(x), load_encoder(run8)(x), limit=1e-6)
    byol = build_byol(run.config.model, num_classes=3)
    load_initial_weights(byol, dataclasses.replace(run.config, out=str(tmp_path / "new"), init_from=str(out)))
    for name, value in load_encoder(out).state_dict().items():
        assert torch.equal(byol.target.encoder.state_dict()[name], value), name


@pytest.mark.parametrize("source", ["run", "export"])
@pytest.mark.parametrize(("name", "value"), [("stem", "small"), ("padding", "same")])
def test_a_run_does_not_start_from_weights_of_equal_shapes_that_would_have_other_features_in_it(
    name, value, source, run8, exported_run, tmp_path
):
    path, config = run8 if source == "run" else exported_run / "encoder.safetensors", load_run(run8).config
    theirs = getattr(config.model, name)
    assert theirs != value
    other = dataclasses.replace(config.model, **{name: value})
    byol = build_byol(other, num_classes=3)
    with pytest.raises(UserError, match=f"init_from = .*has model.{name} {theirs}, this run {value}.*give --model.{name} {theirs}$"):
        load_initial_weights(byol, dataclasses.replace(config, model=other, out=str(tmp_path / "new"), init_from=str(path)))


def test_a_suffix_in_upper_case_means_the_same_format(run8, tmp_path):
    out = tmp_path / "E.SAFETENSORS"
    fastbyol_command(["export", "--checkpoint", str(run8), "--to", "safetensors", "--out", str(out)])
    with safe_open(out, framework="pt") as file:
        assert "fastbyol" in file.metadata()
    assert load_run_or_weights(out).config.views.size_px == 32
    (tmp_path / "W.PKL").write_bytes(b"")
    with pytest.raises(UserError, match="a pickle can run code"):
        load_encoder(tmp_path / "W.PKL")
    np.savez(tmp_path / "w.npz", w=np.ones(3))
    (tmp_path / "w.npz").rename(tmp_path / "W.NPZ")
    with pytest.raises(UserError, match="no encoder found among its 1 tensors"):
        load_encoder(tmp_path / "W.NPZ")


def test_a_folded_program_has_no_batch_norm_left_and_the_same_features(run8, tmp_path):
    out = tmp_path / "encoder.pt2"
    fastbyol_command(["export", "--checkpoint", str(run8), "--to", "torch_export", "--fold_bn", "yes", "--out", str(out)])
    program = torch.export.load(out)
    assert not [node for node in program.graph.nodes if "norm" in str(node.target)]
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert _near(program.module()(x), load_encoder(run8)(x), limit=1e-5)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_folding_keeps_the_features_of_both_kinds_of_blocks_and_leaves_the_encoder_as_it_was(block):
    encoder = _varied(ResNet(block, (1, 2), padding="same", stem_channels=8))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want, short = encoder(x), folded(encoder)
        assert not [module for module in short.modules() if isinstance(module, nn.BatchNorm2d)]
        assert _near(short(x), want, limit=1e-5)
        assert torch.equal(encoder(x), want)


# What is refused.


@pytest.mark.parametrize(
    ("name", "model", "says"),
    [
        ("timm", {"encoder": "resnet8"}, "timm has no resnet8, .*; formats that can hold it: safetensors, onnx, torch_export"),
        ("torchvision", {"encoder": "resnet50", "width": 2}, "no model.width 2"),
        ("huggingface", {"encoder": "resnet18", "stem": "small2"}, "this one has model.stem small2"),
        ("detectron2", {"encoder": "resnet50", "padding": "same"}, "model.padding same would give other features there"),
        (
            "torchvision",
            {"encoder": "timm/convnext_atto"},
            "does not have timm's convnext_atto; formats that can hold it: timm, safetensors",
        ),
        ("onyx", {}, r"no such format \(did you mean onnx\?\)"),
    ],
)
def test_a_format_that_cannot_hold_the_encoder_says_which_ones_can(name, model, says):
    with pytest.raises(UserError, match=f"--to {name}: .*{says}"):
        formats_for([name], ModelConfig(**model))


def test_folding_that_has_no_effect_is_refused():
    with pytest.raises(UserError, match="--fold_bn: has no effect on timm"):
        formats_for(["timm"], ModelConfig(), fold="yes")
    with pytest.raises(UserError, match="--fold_bn yes: timm/convnext_atto is not one of our ResNets"):
        formats_for(["torch_export"], ModelConfig(encoder="timm/convnext_atto"), fold="yes")


def test_a_missing_library_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"--to onnx: onnxscript is not installed; pip install 'fastbyol\[export\]'"):
        formats_for(["onnx"], ModelConfig())
    chosen, left_out = formats_for(["all"], ModelConfig())
    assert "onnx" not in chosen
    assert left_out["onnx"].startswith("onnxscript is not installed")


def test_nothing_is_replaced_unasked_and_no_folder_of_others_at_all(tmp_path):
    timm_file, folder = tmp_path / "a.safetensors", tmp_path / "hub"
    timm_file.touch()
    folder.mkdir()
    for names, out, overwrite, says in (
        (["timm"], timm_file, False, "exists; give another name, or --overwrite"),
        (["onnx"], tmp_path / "a.bin", False, "must end in .onnx for onnx"),
        (["onnx", "timm"], timm_file, True, "is a file; several formats need a folder"),
        (["onnx"], tmp_path / "none" / "a.onnx", True, "is not a folder that may be written"),
        (["onnx", "timm"], tmp_path / "b.onnx", False, "is the name of a file, and onnx and timm need a folder"),
        (["onnx", "timm"], tmp_path / "b.PTH", False, "is the name of a file, and onnx and timm need a folder"),
        (["huggingface"], Path("."), True, "--out .: gives no name for the output; give one, for example NAME"),
        (["huggingface"], Path(".."), True, "for example ../NAME"),
        (["onnx"], Path("/"), True, "for example /NAME"),
    ):
        with pytest.raises(UserError, match=says):
            places({name: format_named(name) for name in names}, out, overwrite=overwrite)
    hub = {"huggingface": format_named("huggingface")}
    (folder / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis.tex, which no export wrote"):
        places(hub, folder, overwrite=True)
    (folder / "thesis.tex").unlink()
    assert places(hub, folder, overwrite=True) == {"huggingface": folder}


def test_a_folder_may_have_a_name_like_a_files_if_it_is_there(tmp_path):
    (tmp_path / "v1.pth").mkdir()
    where = places({name: format_named(name) for name in ("onnx", "timm")}, tmp_path / "v1.pth", overwrite=False)
    assert set(where.values()) == {tmp_path / "v1.pth" / format_named(name).file for name in ("onnx", "timm")}


def test_an_encoder_that_does_not_exist_is_said_before_formats_that_cannot_hold_it(tmp_path, source, capsys):
    torch.save(source.state_dict(), tmp_path / "w.pth")
    options = ["--to", "torchvision", "--out", str(tmp_path / "x.pth"), "--model.encoder", "timm/nosuch"]
    with pytest.raises(SystemExit):
        fastbyol_command(["export", "--checkpoint", str(tmp_path / "w.pth"), *options])
    said = capsys.readouterr().err
    assert "model.encoder = 'timm/nosuch': timm " in said
    assert "formats that can hold it" not in said


def test_an_export_says_which_step_it_is_of_and_that_another_run_helps_where_no_checkpoint_is_whole(colours_run, tmp_path, capsys):
    shutil.copytree(colours_run, tmp_path / "run")
    newest = checkpoint_path(tmp_path / "run", checkpoint_steps(tmp_path / "run")[-1])
    state = torch.load(newest) | {"step": 3}
    save_checkpoint(tmp_path / "run", step=3, state=state, keep=9)
    newest.write_bytes(newest.read_bytes()[:-1])
    export = ["export", "--checkpoint", str(tmp_path / "run"), "--to", "safetensors", "--out", str(tmp_path / "e.safetensors")]
    fastbyol_command(export)
    assert re.search(
        r"^exported: .*e.safetensors \(.* MB\), for safetensors, of the checkpoint after step 3$", capsys.readouterr().out, re.M
    )
    checkpoint_path(tmp_path / "run", 3).write_bytes(b"")
    with pytest.raises(SystemExit):
        fastbyol_command(export)
    assert "checkpoints are damaged or of another run; give another checkpoint (the newest:" in capsys.readouterr().err


@pytest.fixture(scope="module")
def subject() -> Subject:
    encoder = build_encoder("resnet18").eval()
    return Subject(encoder, TrainConfig(model=ModelConfig(encoder="resnet18"), views=ViewPair(size_px=32)))


_FACTS = {"licence": "unknown", "options": {}}


def test_an_export_that_computes_other_features_is_refused_and_not_left_behind(subject, tmp_path):
    sound = format_named("timm")
    wrong = build_encoder("resnet18").eval()
    broken = {"timm": dataclasses.replace(sound, read=lambda path, subject: wrong)}
    images = CheckImages(generated_images(subject.config.views), "8 generated images")
    with pytest.raises(UserError, match="differ from its own by .* nothing was written"):
        list(write_exports(subject, broken, {"timm": tmp_path / "a.safetensors"}, _FACTS, images, announce=lambda _: None))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["timm", "huggingface"])
def test_a_full_disk_is_one_line_and_leaves_the_export_before(name, subject, tmp_path):
    images = CheckImages(generated_images(subject.config.views), "8 generated images")
    path = tmp_path / ("hub" if name == "huggingface" else "a.safetensors")
    if name == "huggingface":
        path.mkdir()
        (path / "README.md").write_text("before")
    else:
        path.write_text("before")
    with files_no_larger_than(1 << 20), pytest.raises(UserError, match=f"--out {path}: cannot be written .File too large"):
        list(write_exports(subject, {name: format_named(name)}, {name: path}, _FACTS, images, announce=lambda _: None))
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "README.md" if path.is_dir() else path).read_text() == "before"


def test_a_source_is_named_without_the_folders_above_it():
    assert source_name("/home/me/photos/train.beton") == "photos/train.beton"
    assert source_name("/data/birds::/data/fish/") == "birds + fish"
    assert source_name("") == ""


def test_torch_hub_finds_the_encoder_in_this_repository(run8):
    encoder = torch.hub.load(str(ROOT), "encoder", checkpoint=str(run8), source="local")
    assert encoder.feature_dim == 128
    assert not encoder.training
