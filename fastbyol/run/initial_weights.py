"""Initial weights from another run's networks or from a bare encoder; the new run has its own schedule."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastbyol.byol import BYOL
from fastbyol.config.errors import UserError
from fastbyol.config.plain import from_plain
from fastbyol.config.schema import WEIGHTS_OPTIONS, ModelConfig, TrainConfig
from fastbyol.host.saved_structure import tensor_difference
from fastbyol.run.checkpoint import REQUIRED, checkpoint_steps
from fastbyol.run.foreign_weights import HAIKU, classifiers_of, match_names
from fastbyol.run.weights_files import description_of, read_weights, weights_file

log = logging.getLogger("fastbyol")
OPTION = "init_from"
_MODEL_OPTIONS = tuple(name.removeprefix("model.") for name in WEIGHTS_OPTIONS if name.startswith("model."))


def load_initial_weights(byol: BYOL, config: TrainConfig) -> None:
    """Loads the weights that `init_from` names into the networks, in place; nothing if it is empty or the run has a checkpoint of its own.

    A run folder or checkpoint of fastbyol has both networks, and the probe if the number of classes is equal. An export or another program's
    file has an encoder's weights, which both networks get; their heads stay as they are (see `encoder_weights`).

    Raises UserError if there is no such path, no usable weights in it, networks of another shape (with the first names that differ), or if
    a checkpoint or export says that its encoder has another name, width, stem or padding.
    """
    source = config.init_from
    if not source or checkpoint_steps(Path(config.out)):
        return
    state = read_weights(Path(source), option=OPTION)
    if set(REQUIRED) <= state.keys():
        weights = dict(state["byol"])
        own = byol.state_dict()
        # The probe does not influence the networks, so another data set's number of classes is no reason to refuse them.
        other_probe = [name for name in ("probe.weight", "probe.bias") if name in weights and weights[name].shape != own[name].shape]
        if other_probe:
            log.info("%s = %s: its probe is not loaded, for this run has %d classes", OPTION, source, len(own["probe.bias"]))
            weights.update({name: own[name] for name in other_probe})
        load_matching(byol, weights, source=f"{OPTION} = {source!r}")
        theirs = from_plain(TrainConfig, state["config"], where="config.").model
        _refuse_other_features({name: getattr(theirs, name) for name in _MODEL_OPTIONS}, config.model, source=f"{OPTION} = {source!r}")
        log.info("%s = %s: loaded both networks, after its step %d", OPTION, source, state["step"])
        return
    own, classifiers = byol.online.encoder.state_dict(), classifiers_of(byol.online.encoder)
    weights = encoder_weights(state, own, source=f"{OPTION} = {source!r}", classifiers=classifiers)
    for network in (byol.online, byol.target):
        load_matching(network.encoder, weights, source=f"{OPTION} = {source!r}")
    said = {name.removeprefix("model."): value for name, value in description_of(weights_file(Path(source))).items()}
    _refuse_other_features(said, config.model, source=f"{OPTION} = {source!r}")
    log.info("%s = %s: loaded the encoder of both networks", OPTION, source)


def _refuse_other_features(said: Mapping[str, Any], model: ModelConfig, *, source: str) -> None:
    """Raises UserError if the weights were trained in a network that computes other features of equal shapes: its stride or padding differ."""
    for name in _MODEL_OPTIONS:
        if name in said and said[name] != (mine := getattr(model, name)):
            raise UserError(
                f"{source}: its network has model.{name} {said[name]}, this run {mine}, which makes other features of the same weights; "
                f"give --model.{name} {said[name]}"
            )


def encoder_weights(state: dict[Any, Any], own: dict[str, Tensor], *, source: str, classifiers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Returns the encoder's weights from another program's file under our names; logs what was taken and what was not.

    The file may store them under a key (state_dict, model, ...), with a prefix before the names (module., encoder., backbone., ...),
    numbered, together with heads and other networks, in another floating-point type, and without num_batches_tracked of batch norm, like
    PyTorch before 0.4.1 and some converters; see `foreign_weights`. Raises UserError if the file holds no named tensors.
    """
    found = match_names(state, own, source=source, classifiers=classifiers)
    if found.place() or found.left_out or found.missing:
        log.info("%s: %s; every key: python -m fastbyol weights", source, found.summary())
    if found.layout == HAIKU:
        log.info("%s: DeepMind's weights were trained with TensorFlow's padding, which is model.padding same", source)
    if found.others:
        log.warning("%s: %s would fit as well as %r", source, ", ".join(map(repr, found.others[:3])), found.prefix)
    return found.weights


def load_matching(module: nn.Module, weights: dict[str, Tensor], *, source: str) -> None:
    """Calls `load_state_dict`; one-line UserError if names, shapes or types differ. Other floating-point types are converted."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    pairs = [(name, weights[name], value) for name, value in own.items() if name in weights]
    wrong = [found for name, value, mine in pairs if (found := tensor_difference(value, mine, name, any_float=True))]
    if not wrong and (infinite := [name for name, value, _ in pairs if not value.isfinite().all()]):
        others = f", as do {len(infinite) - 1} more of its tensors" if len(infinite) > 1 else ""
        raise UserError(
            f"{source}: {infinite[0]} holds numbers that are not finite{others}: its training diverged, or the file is damaged; take another file"
        )
    if missing and not extra and not wrong and {_part(name) for name in missing} <= {_part(name) for name in weights}:
        raise UserError(
            f"{source}: is not complete ({_listed([f'it has no {name}' for name in missing])}); take a file with the whole network"
        )
    complaints = [f"it has no {name}" for name in missing] + [f"{name} is unknown here" for name in extra] + wrong
    if complaints:
        raise UserError(f"{source}: holds other networks ({_listed(complaints)}); give the model.… options of that run")
    module.load_state_dict(weights)


def _part(name: str) -> str:
    """Returns the part of a network that a layer belongs to, by the name of one of the layer's tensors: layer2.0 of layer2.0.conv1.weight."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _listed(complaints: Sequence[str]) -> str:
    return "; ".join(complaints[:5]) + (f" and {len(complaints) - 5} more" if len(complaints) > 5 else "")
