"""Weights of other programs: finds the encoder in them, under our names, and says what became of every key.

torchvision's and timm's ResNets have our names. solo-learn, lightly, VISSL, mmselfsup, MoCo and DDP put a prefix before them; lightly also
numbers the parts, as nn.Sequential does. DeepMind's checkpoints have Haiku's names; they are pickles, which run code, so they are read from
an .npz (docs/guide.md says how to make it; `weights_files` reads them).
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastbyol.config.console import printable
from fastbyol.config.errors import UserError, shortened
from fastbyol.config.plain import from_plain, nearest_name, to_plain
from fastbyol.config.schema import WEIGHTS_OPTIONS, ModelConfig, TrainConfig
from fastbyol.config.views import TORCHVISION, ViewPair
from fastbyol.models.resnet import DEPTHS, STEM_CHANNELS, Bottleneck
from fastbyol.run.checkpoint import REQUIRED, RESULTS, CheckpointError, RunState, load_run
from fastbyol.run.weights_files import description_of, read_weights, weights_file

log = logging.getLogger("fastbyol")
FOREIGN_VIEWS = TORCHVISION
"""Size and normalisation of images for weights that come without: ImageNet's 224 px, antialiased as Pillow and torchvision resize."""
_DEEPEST = 16
"""Levels of a file's nested dicts that are searched for weights; VISSL nests them four deep."""


_CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
"""nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]), as lightly's examples build it: 2 is the ReLU, 3 the max-pool."""
_LIGHTLY = {"conv1": "0", "bn1": "1", "layer1": "2", "layer2": "3", "layer3": "4", "layer4": "5"}
"""The same of lightly's own ResNetGenerator, which has no module for ReLU and no max-pool."""


def _numbered(name: str, numbers: Mapping[str, str]) -> str:
    part, dot, rest = name.partition(".")
    return numbers.get(part, part) + dot + rest


def _with_shortcut(name: str) -> str:
    return name.replace(".downsample.", ".shortcut.")


LAYOUTS: dict[str, Callable[[str], str]] = {
    "torchvision's names": lambda name: name,
    "numbered as torchvision's children": lambda name: _numbered(name, _CHILDREN),
    "names with 'shortcut'": _with_shortcut,
    "numbered as lightly's ResNetGenerator": lambda name: _numbered(_with_shortcut(name), _LIGHTLY),
}
"""What each layout calls one of our parameters, apart from a prefix."""
HAIKU = "Haiku's names"
_AVERAGE = re.compile(r"momentum|teacher|target|(^|[._])(ema|encoder_k)([._]|$)")


def _from_haiku(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of DeepMind's BYOL under torchvision's names, and the Haiku name of each.

    Source: deepmind-research/byol/utils/networks.py; shapes: kernels are (H, W, in, out), batch norm's (1, 1, 1, C).
    """
    renamed, origin = {}, {}
    # A file may hold the target network too: the online network's names come first, and the others stay as they are.
    for name in sorted(tensors, key=_is_average):
        mine, tensor = _name_from_haiku(name), tensors[name]
        value = tensor
        if mine in renamed:
            mine = name
        if mine != name:
            value = tensor.permute(3, 2, 0, 1).contiguous() if name.endswith("/w") and tensor.ndim == 4 else tensor.flatten()
        renamed[mine], origin[mine] = value, name
    return renamed, origin


_HAIKU = re.compile(
    r"(?:.*/)?(?:initial_(?P<stem>conv|batchnorm)(?:_1)?|block_group_(?P<group>\d)/.*?block_(?P<block>\d+)/~/"
    r"(?:shortcut_(?P<short>conv|batchnorm)|(?P<kind>conv|batchnorm)_(?P<number>\d)))/(?P<leaf>w|scale|offset|~/(?:mean|var)_ema/average)"
)
_HAIKU_LEAVES = {
    "w": "weight",
    "scale": "weight",
    "offset": "bias",
    "~/mean_ema/average": "running_mean",
    "~/var_ema/average": "running_var",
}


def _name_from_haiku(name: str) -> str:
    found = _HAIKU.fullmatch(name)
    if not found:
        return name
    short = {"conv": "conv", "batchnorm": "bn"}
    leaf = _HAIKU_LEAVES[found["leaf"]]
    if found["stem"]:
        return f"{short[found['stem']]}1.{leaf}"
    block = f"layer{int(found['group']) + 1}.{int(found['block'])}"
    if found["short"]:
        return f"{block}.downsample.{int(found['short'] == 'batchnorm')}.{leaf}"
    return f"{block}.{short[found['kind']]}{int(found['number']) + 1}.{leaf}"


@dataclass(frozen=True)
class NamedWeights:
    """The named tensors of a file, under the key that holds most of them. key: that key; '' for the top level. origin: the file's name of each
    tensor that was renamed here. outside: number of tensors under each other key.
    """

    key: str
    tensors: dict[str, Tensor]
    origin: dict[str, str]
    outside: dict[str, int]

    @classmethod
    def of(cls, state: Mapping[Any, Any]) -> NamedWeights:
        groups = dict(_groups(state))
        # On a tie prefer a key that does not name a moving average (DINO's teacher, timm's state_dict_ema), then the one written first.
        key = max(groups, key=lambda each: (len(groups[each].named), not _is_average(".".join(each))))
        tensors, origin = groups[key].named, {}
        if any(_name_from_haiku(name) != name for name in tensors):
            tensors, origin = _from_haiku(tensors)
        outside: dict[str, int] = {}
        for path, group in groups.items():
            if count := group.others + (len(group.named) if path != key else 0):
                same = next((i for i, (a, b) in enumerate(zip(path, key, strict=False)) if a != b), min(len(path), len(key)))
                place = ".".join(path[: same + 1]) or "(top level)"
                outside[place] = outside.get(place, 0) + count
        return cls(".".join(key), tensors, origin, outside)


class _Group(NamedTuple):
    """The tensors directly in one dict or list of a file: those with a name, and the number of the others."""

    named: dict[str, Tensor]
    others: int


def _groups(state: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], _Group]]:
    """Yields every dict and list of a file with its place, the outer ones first."""
    # A loop, and each object once: a hostile file may nest deeply or contain itself.
    left: deque[tuple[tuple[str, ...], Any]] = deque([((), state)])
    seen: set[int] = set()
    while left:
        path, value = left.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        items = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
        tensors = [(name, each) for name, each in items if isinstance(each, Tensor)]
        named = {name: each for name, each in tensors if isinstance(name, str)}
        yield path, _Group(named, len(tensors) - len(named))
        if len(path) < _DEEPEST:
            left += (((*path, str(name)), each) for name, each in items if isinstance(each, Mapping | list | tuple))


@dataclass(frozen=True)
class Matching:
    """An encoder's weights as found in a file.

    weights: by our names; layers that the encoder does not have are among them, so that loading refuses a deeper network's file.
    taken: the file's name of each. left_out: why the others are not used. missing: our names that it lacks, with what happens.
    layout, prefix: how the file names things. others: further prefixes that would fit as well. outside: as in `NamedWeights`.
    """

    weights: dict[str, Tensor]
    taken: dict[str, str]
    left_out: dict[str, str]
    missing: dict[str, str]
    key: str
    layout: str
    prefix: str
    others: tuple[str, ...]
    outside: dict[str, int]

    def place(self) -> str:
        """Returns where in the file the weights are, for example state_dict.backbone; '' for plain names at the top level."""
        return ".".join(filter(None, [self.key, self.prefix.rstrip(".")]))

    def summary(self) -> str:
        """Returns one line: how many tensors are taken from where, and what is not."""
        reasons = dict.fromkeys(self.left_out.values())
        heads = sorted({name.removeprefix(self.prefix).split(".")[0] for name, why in self.left_out.items() if why == _HEAD})
        others = sum(why != _HEAD for why in self.left_out.values())
        renamed = self.layout != next(iter(LAYOUTS))
        counters = sum(what == _UNCOUNTED for what in self.missing.values())
        return "".join(
            (
                f"loads {len(self.taken)} tensors",
                f" from {self.place()!r}" if self.place() else "",
                f" ({self.layout})" if renamed else "",
                f", but not {', '.join(map(repr, heads[:5]))} in the same file" if heads else "",
                f", nor {others} {'of other networks' if _OTHER in reasons else 'more'}" if others else "",
                f"; {counters} num_batches_tracked are missing and stay 0" if counters else "",
            )
        )

    def lines(self) -> Iterator[str]:
        """Yields a line for each key of the file, and for each of ours that it lacks."""
        width = max(map(len, [*self.taken.values(), *self.left_out]), default=0)
        for mine, theirs in self.taken.items():
            yield f"{theirs:{width}}  {'taken' if mine == theirs else f'taken as {mine}'}"
        for theirs, why in self.left_out.items():
            yield f"{theirs:{width}}  left out: {why}"
        for key, count in self.outside.items():
            yield f"{f'{key}.*':{width}}  left out: {count} tensor{'s' * (count > 1)} outside {self.key or 'the state dict'}"
        for mine, what in self.missing.items():
            yield f"{mine:{width}}  missing: {what}"


_HEAD, _OTHER, _RUNNING = "a head or another part that the encoder does not have", "of another network in the file", "Haiku's own counter"
_UNCOUNTED, _LACKING = "stays 0, only batch norm without momentum reads it", "the encoder cannot be loaded without it"


def match_names(state: Mapping[Any, Any], own: Mapping[str, Tensor], *, source: str, classifiers: tuple[str, ...] = ()) -> Matching:
    """Finds the tensors of a file that belong to the encoder `own`, whatever key, prefix and layout they have.

    classifiers: what the names of a classifier begin with, if it is inside a part that the encoder has.

    Raises:
        UserError: the file holds no named tensors.
    """
    named = NamedWeights.of(state)
    if not named.tensors:
        raise CheckpointError(f"{source}: is not a state dict (names to tensors)")
    best: tuple[int, str, str, list[str]] | None = None
    for layout, theirs in LAYOUTS.items():
        wanted = [theirs(mine) for mine in own]
        # Everything that stands in front of one of these names is a candidate; the one in front of most of them wins.
        prefixes = dict.fromkeys(name.removesuffix(mine) for name in named.tensors for mine in wanted if name.endswith(mine))
        held = {prefix: sum(prefix + mine in named.tensors for mine in wanted) for prefix in prefixes if not prefix or prefix.endswith(".")}
        # On a tie prefer the trained network to its average, then the first prefix: programs write the trained network first.
        prefix = max(held, key=lambda each: (held[each], not _is_average(each)), default="")
        count = held.get(prefix, 0)
        if best is None or count > best[0]:
            best = count, layout, prefix, [each for each, other in held.items() if each != prefix and other == count]
    assert best is not None
    _, layout, prefix, others = best
    ours = {prefix + LAYOUTS[layout](mine): mine for mine in own}
    # Names inside the encoder's parts that it does not have are kept under their own names.
    parts = {LAYOUTS[layout](name).split(".")[0] for name in own}
    weights, taken, left_out = {}, {}, {}
    for name, tensor in named.tensors.items():
        theirs, inside = named.origin.get(name, name), name.removeprefix(prefix)
        if name in ours:
            weights[ours[name]], taken[ours[name]] = tensor, theirs
        elif name.startswith(prefix) and inside.split(".")[0] in parts and not inside.startswith(classifiers):
            weights[inside], taken[inside] = tensor, theirs
        else:
            left_out[theirs] = _reason(name, prefix)
    lacking = [name for name in own if name not in taken]
    counters = [name for name in lacking if name.endswith("num_batches_tracked")]
    if named.origin:
        layout = HAIKU
    missing = dict.fromkeys(lacking, _LACKING) | dict.fromkeys(counters, _UNCOUNTED)
    return Matching(
        weights | {name: own[name] for name in counters}, taken, left_out, missing, named.key, layout, prefix, tuple(others), named.outside
    )


def classifiers_of(encoder: nn.Module) -> tuple[str, ...]:
    """Returns what the names of a timm model's classifier begin with: ConvNeXt's is inside a head that the encoder has too."""
    settings: Any = getattr(encoder, "pretrained_cfg", None)
    names = settings.get("classifier") if isinstance(settings, dict) else None
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names or ()))


def _is_average(prefix: str) -> bool:
    """Returns True if a prefix names the slowly moving copy of a network; .safetensors files keep no order that could tell."""
    return bool(_AVERAGE.search(prefix))


def _reason(name: str, prefix: str) -> str:
    if name.rpartition("/")[2] in ("hidden", "counter"):
        return _RUNNING
    return _HEAD if name.startswith(prefix) and not _HAIKU.fullmatch(name) else _OTHER


# ---- an encoder without a config


def encoder_of_shapes(state: Mapping[Any, Any], *, source: str) -> ModelConfig:
    """Returns the config of the ResNet whose weights the file holds, read off names and shapes.

    A 3x3 first convolution is taken to have stride 1 (`stem` small): shapes do not show it. Haiku's names mean TensorFlow's padding.

    Raises:
        UserError: no ResNet is found, or one of a depth or width that we do not build.
    """
    named = NamedWeights.of(state)
    tensors = named.tensors
    expected = "expected a ResNet with torchvision's, timm's, solo-learn's or lightly's names; for another of timm's models give model.encoder timm/NAME"
    if not tensors:
        raise CheckpointError(f"{source}: is not a state dict (names to tensors)")
    found = min(_stems(tensors), key=lambda each: _is_average(each[1]), default=None)
    if found is None:
        raise UserError(
            f"{source}: no encoder found among its {len(tensors)} tensors (the first: {shortened(next(iter(tensors)))}); {expected}"
        )
    theirs, prefix = found

    def holds(name: str) -> bool:
        return prefix + theirs(name) in tensors

    counts: list[int] = []
    while len(counts) < 8 and holds(f"layer{len(counts) + 1}.0.conv1.weight"):
        group, blocks = len(counts) + 1, 0
        while holds(f"layer{group}.{blocks}.conv1.weight"):
            blocks += 1
        counts.append(blocks)
    bottleneck = holds("layer1.0.conv3.weight")
    stem = tensors[prefix + theirs("conv1.weight")]
    for name, (block, blocks) in DEPTHS.items():
        width, rest = divmod(stem.shape[0], STEM_CHANNELS.get(name, 64))
        if blocks == tuple(counts) and (block is Bottleneck) == bottleneck and width and not rest:
            padding = "same" if named.origin else "symmetric"
            return ModelConfig(encoder=name, width=width, stem="imagenet" if stem.shape[2] == 7 else "small", padding=padding)
    kind = "bottleneck" if bottleneck else "basic"
    raise UserError(
        f"{source}: a ResNet of {counts} {kind} blocks and {stem.shape[0]} stem channels is none of {', '.join(DEPTHS)}; {expected}"
    )


def _stems(tensors: Mapping[str, Tensor]) -> Iterator[tuple[Callable[[str], str], str]]:
    """Yields layout and prefix of every first convolution of a ResNet."""
    for theirs in LAYOUTS.values():
        stem = theirs("conv1.weight")
        for name, tensor in tensors.items():
            prefix = name.removesuffix(stem)
            starts = name == prefix + stem and (not prefix or prefix.endswith("."))
            if starts and tensor.ndim == 4 and tensor.shape[1] == 3 and tensor.shape[2] in (3, 7):
                wanted = ("layer1.0.conv1.weight", "layer2.0.downsample.0.weight")
                if all(prefix + theirs(each) in tensors for each in wanted):
                    yield theirs, prefix


def load_run_or_weights(path: str | Path, *, changes: Mapping[str, Any] | None = None) -> RunState:
    """Loads a run as `load_run` does, or another program's weights as a run of no steps, with `state['encoder']` in place of its networks.

    Args:
        path: run folder, checkpoint file, or weights file.
        changes: for weights only, options that the file cannot tell, by dotted name: views.size_px (224), views.mean, model.stem, ...

    Raises:
        UserError: nothing to load there; no encoder found; changes for a run, which has its own config.
    """
    (found,) = load_runs_or_weights([path], changes=changes)
    return found


def load_runs_or_weights(paths: Sequence[str | Path], *, changes: Mapping[str, Any] | None = None) -> list[RunState]:
    """Loads each path as `load_run_or_weights` does. The changes apply to weights only: a run among the paths has its own config.

    Raises UserError as `load_run_or_weights` does, and for changes if all paths are runs.
    """
    found = [_loaded(path, dict(changes or {})) for path in paths]
    if changes and not any("encoder" in run.state for run in found):
        raise UserError(f"{next(iter(changes))}: has no effect on a run, whose config has it; the option is for weights of other programs")
    return found


def _loaded(path: str | Path, changes: dict[str, Any]) -> RunState:
    path = weights_file(Path(path))
    is_run = path.is_dir()
    state: dict[Any, Any] = {}
    if not is_run:
        state = read_weights(path, option="checkpoint")
        is_run = set(REQUIRED) <= state.keys()
    if is_run:
        return load_run(path)
    for name in changes:
        if name not in WEIGHTS_OPTIONS:
            raise UserError(
                f"{name}: is not an option of weights{nearest_name(name, WEIGHTS_OPTIONS)}; those are {', '.join(WEIGHTS_OPTIONS)}"
            )
    source = f"checkpoint = {str(path)!r}"
    changes = description_of(path) | changes
    if "model.encoder" in changes:
        model = ModelConfig(padding="same" if NamedWeights.of(state).origin else "symmetric")
    else:
        model = encoder_of_shapes(state, source=source)
    model = _changed(model, changes, "model")
    if model.stem == "small" and "model.stem" not in changes:
        log.warning("%s: its first convolution is 3x3 and taken to have stride 1; if it has stride 2, give model.stem small2", source)
    config = TrainConfig(
        model=model,
        views=_changed(FOREIGN_VIEWS if model.padding == "symmetric" else ViewPair(), changes, "views"),
    )
    state = {"encoder": state, "source": source}
    results = path.with_name(f"{path.stem}.{RESULTS}")
    return RunState(config=config, state=state, step=0, folder=path.parent, results=results, title=f"weights {printable(path.name)}")


def _changed(config: Any, changes: Mapping[str, Any], group: str) -> Any:
    values = {name.removeprefix(f"{group}."): value for name, value in changes.items() if name.startswith(f"{group}.")}
    checked = from_plain(type(config), to_plain(config) | values, where=f"{group}.")
    return replace(config, **{name: getattr(checked, name) for name in values})
