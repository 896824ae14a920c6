"""Options of the step that change its cost and not its results: the padded stem, cuDNN's search, freed memory, the order of the networks."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastbyol.byol import build_byol
from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig, PrecisionConfig
from fastbyol.models import build_encoder
from fastbyol.models.encoder import pad_stem
from fastbyol.run import precision
from fastbyol.run.precision import prepare_model, use_switches

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [{"stem": "imagenet"}, {"stem": "small2"}, {"stem": "imagenet", "padding": "same"}], ids=str)
def test_a_padded_stem_gives_the_same_features_and_gradients_to_parameters_of_the_same_shape(options: dict) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet8", **options).double()
    padded = copy.deepcopy(encoder)
    pad_stem(padded)
    convolved: list[tuple[int, int]] = []
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with _Convolutions(convolved):
        ours = padded(images)
    assert convolved[0] == (4, 4), "the first convolution reads four channels of images and of weights"
    torch.testing.assert_close(ours, encoder(images), rtol=1e-12, atol=1e-12)
    ours.square().sum().backward()
    encoder(images).square().sum().backward()
    for (name, mine), theirs in zip(padded.named_parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert {name: value.shape for name, value in padded.state_dict().items()} == {n: v.shape for n, v in encoder.state_dict().items()}


class _Convolutions(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the input channels of image and weight of every convolution."""

    def __init__(self, seen: list[tuple[int, int]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "aten::convolution":
            self.seen.append((args[0].shape[1], args[1].shape[1]))
        return func(*args, **(kwargs or {}))


def test_a_padded_stem_is_part_of_one_compiled_graph_and_a_copy_keeps_it() -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    images = torch.randn(1, 3, 8, 8)
    wanted = stem(images)
    pad_stem(stem)
    copied = copy.deepcopy(stem)
    with torch.no_grad():
        stem[0].weight.zero_()
    torch.testing.assert_close(copied(images), wanted)  # by its own weights, not those of the stem that it was copied from
    compiled = torch.compile(copied, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(images), wanted)


def test_prepare_model_pads_the_stems_of_both_networks_where_the_config_says_so() -> None:
    for wanted in (False, True):
        byol = build_byol(ModelConfig(encoder="resnet8", hidden_dim=16, projection_dim=8), num_classes=2)
        prepare_model(byol, PrecisionConfig(pad_stem=wanted), device=CPU)
        padded = ["_conv_forward" in vars(network.encoder.conv1) for network in (byol.online, byol.target)]
        assert padded == [wanted, wanted]


def test_cudnns_search_follows_the_config_and_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for wanted in (True, False):
        use_switches(PrecisionConfig(cudnn_benchmark=wanted))
        assert torch.backends.cudnn.benchmark is wanted
    with pytest.raises(UserError, match="precision.cudnn_benchmark = true: cuDNN needs a GPU, and the device is cpu"):
        prepare_model(nn.Linear(1, 1), PrecisionConfig(cudnn_benchmark=True), device=CPU)


def test_freed_memory_is_kept_or_returned_as_the_config_says_and_only_a_cpu_has_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr(precision, "keep_freed_memory", lambda: kept.append("kept"))
    monkeypatch.setattr(precision, "return_large_blocks", lambda: kept.append("returned"))
    prepare_model(nn.Linear(1, 1), PrecisionConfig(freed_memory="return"), device=CPU)
    assert kept == ["returned"]
    prepare_model(nn.Linear(1, 1), PrecisionConfig(), device=CPU)
    assert kept == ["returned", "kept"]
    with pytest.raises(UserError, match="precision.freed_memory = 'return': only for runs on a CPU, and the device is cuda"):
        prepare_model(nn.Linear(1, 1), PrecisionConfig(freed_memory="return"), device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("device", "own", "changed"),
    [
        ("cpu", {}, {}),
        ("cpu", {"autocast": "fp16"}, {"autocast": "off"}),
        ("cpu", {"autocast": "tf32", "cudnn_benchmark": True}, {"autocast": "off", "cudnn_benchmark": False}),
        ("cpu", {"compile_mode": "max-autotune", "compile_cache": "cache"}, {"compile_mode": "default", "compile_cache": ""}),
        ("cpu", {"compile_mode": "reduce-overhead", "compile": "yes"}, {"compile_mode": "default"}),
        ("cpu", {"compile_mode": "max-autotune", "compile_cache": "cache", "compile": "yes", "freed_memory": "return"}, {}),
        ("cuda", {"autocast": "fp16", "cudnn_benchmark": True, "compile_mode": "reduce-overhead", "compile_cache": "cache"}, {}),
        ("cuda", {"freed_memory": "return"}, {"freed_memory": "keep"}),
    ],
    ids=str,
)
def test_a_runs_precision_is_fitted_to_another_kind_of_device_and_then_accepted_there(device: str, own: dict, changed: dict) -> None:
    config, said, place = PrecisionConfig(**own), [], torch.device(device)
    fitted = precision.fitted(config, device=place, announce=said.append)
    assert fitted == replace(config, **changed)
    assert [name in "".join(said) for name in changed] == [True] * len(changed)
    assert len(said) == bool(changed)
    precision._check_device(fitted, place)
    precision.check_compile(fitted, device=place)


def test_the_target_is_done_before_the_online_network_fills_the_memory() -> None:
    byol = build_byol(ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8), num_classes=2)
    order: list[str] = []
    byol.target.register_forward_hook(lambda *_: order.append("target done"))
    byol.online.register_forward_pre_hook(lambda *_: order.append("online begins"))
    views = torch.randn(4, 3, 32, 32)
    byol(views, None, torch.zeros(2, dtype=torch.int64))
    assert order == ["target done", "online begins"]
