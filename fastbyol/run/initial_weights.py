"""Initial weights from another run's networks or from a bare encoder; the new run has its own schedule."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastbyol.byol import BYOL
from fastbyol.config.errors import UserError
from fastbyol.config.schema import TrainConfig
from fastbyol.host.saved_structure import tensor_difference
from fastbyol.run.checkpoint import REQUIRED, CheckpointError, checkpoint_steps, load_checkpoint, load_run

log = logging.getLogger("fastbyol")
OPTION = "init_from"


def load_initial_weights(byol: BYOL, config: TrainConfig) -> None:
    """Loads the weights that `init_from` names into the networks, in place; nothing if it is empty or the run has a checkpoint of its own.

    A run folder or checkpoint of fastbyol has both networks, and the probe if the number of classes is equal. Any other file of torch.save
    has an encoder's weights, which both networks get; their heads stay as they are (see `encoder_weights`).

    Raises UserError if there is no such path, no usable weights in it, or networks of another shape (with the first names that differ).
    """
    source = config.init_from
    if not source or checkpoint_steps(Path(config.out)):
        return
    state = _read(Path(source))
    if set(REQUIRED) <= state.keys():
        weights = dict(state["byol"])
        own = byol.state_dict()
        # The probe does not influence the networks, so another data set's number of classes is no reason to refuse them.
        for name in ("probe.weight", "probe.bias"):
            if name in weights and weights[name].shape != own[name].shape:
                log.info("%s = %s: the probe of %d classes is not loaded", OPTION, source, len(own["probe.bias"]))
                weights[name] = own[name]
        load_matching(byol, weights, source=f"{OPTION} = {source!r}")
        log.info("%s = %s: loaded both networks, after its step %d", OPTION, source, state["step"])
        return
    weights = encoder_weights(state, byol.online.encoder.state_dict(), source=source)
    for network in (byol.online, byol.target):
        load_matching(network.encoder, weights, source=f"{OPTION} = {source!r}")
    log.info("%s = %s: loaded the encoder of both networks", OPTION, source)


def encoder_weights(state: dict[Any, Any], own: dict[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Returns the encoder's weights from another program's file under our names; logs what was taken and what was not.

    The file may store them under a key (state_dict, model, ...), with a prefix before the names (module., encoder., backbone., ...),
    together with heads and other networks, in another floating-point type, and without num_batches_tracked of batch norm, like
    PyTorch before 0.4.1 and some converters. Raises UserError if the file holds no named tensors.
    """
    key, tensors = _most_tensors(state)
    if not tensors:
        raise CheckpointError(f"{OPTION} = {source!r}: is not a state dict (names to tensors)")
    # Everything that stands in front of one of our names is a candidate; the one in front of most of them wins.
    prefixes = dict.fromkeys(name.removesuffix(mine) for name in tensors for mine in own if name.endswith(mine))
    held = {prefix: sum(prefix + mine in tensors for mine in own) for prefix in prefixes if not prefix or prefix.endswith(".")}
    prefix = max(held, key=lambda each: held[each], default="")  # on a tie the first one: programs write the trained network first
    others = [each for each, count in held.items() if each != prefix and count == held[prefix]]
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    parts = {name.split(".")[0] for name in own}
    heads = sorted({name.split(".")[0] for name in inside} - parts)
    taken = {name: tensor for name, tensor in inside.items() if name.split(".")[0] in parts}
    counters = [name for name in own if name.endswith("num_batches_tracked") and name not in taken]
    if key or prefix or heads or counters or len(inside) < len(tensors):
        log.info(
            "%s = %s: loads %d tensors%s%s%s%s",
            OPTION,
            source,
            len(taken),
            f" from {'.'.join(filter(None, [key, prefix.rstrip('.')]))!r}" if key or prefix else "",
            f", but not {', '.join(map(repr, heads[:5]))} in the same file" if heads else "",
            f", nor {len(tensors) - len(inside)} of other networks" if len(inside) < len(tensors) else "",
            f"; {len(counters)} num_batches_tracked are missing and stay 0" if counters else "",
        )
    if others:
        log.warning("%s = %s: %s would fit as well as %r", OPTION, source, ", ".join(map(repr, others[:3])), prefix)
    return taken | {name: own[name] for name in counters}


def _most_tensors(state: dict[Any, Any]) -> tuple[str, dict[str, Tensor]]:
    """Returns the key that holds the most named tensors ('' for the file's top level), and those tensors."""
    groups = {"": state} | {key: value for key, value in state.items() if isinstance(value, dict)}
    named = {
        str(key): {name: value for name, value in group.items() if isinstance(name, str) and isinstance(value, Tensor)}
        for key, group in groups.items()
    }
    key = max(named, key=lambda each: len(named[each]))
    return key, named[key]


def load_matching(module: nn.Module, weights: dict[str, Tensor], *, source: str) -> None:
    """Calls `load_state_dict`; one-line UserError if names, shapes or types differ. Other floating-point types are converted."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    pairs = [(name, weights[name], value) for name, value in own.items() if name in weights]
    wrong = [found for name, value, mine in pairs if (found := tensor_difference(value, mine, name, any_float=True))]
    wrong += [f"{name} holds numbers that are not finite" for name, value, _ in pairs if not wrong and not value.isfinite().all()]
    complaints = [f"it has no {name}" for name in missing] + [f"{name} is unknown here" for name in extra] + wrong
    if complaints:
        more = f" and {len(complaints) - 5} more" if len(complaints) > 5 else ""
        raise UserError(f"{source}: holds other networks ({'; '.join(complaints[:5])}{more}); give the model.… options of that run")
    module.load_state_dict(weights)


def _read(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        return load_run(path, option=OPTION).state
    try:
        state = load_checkpoint(path, or_weights=True)
    except CheckpointError as error:
        raise CheckpointError(f"{OPTION}: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{OPTION} = {str(path)!r}: is not a state dict (names to tensors)")
    return state
