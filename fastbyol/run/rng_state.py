"""Saves and restores the random generators of a process as tensors and plain values.

The order and views of the images come from counters (data/traversal.py, augment/parameters.py) and need none of these. They are saved
for anything else that draws during training, such as dropout in a third-party encoder or a user's own code.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from fastbyol.config.errors import shown
from fastbyol.host.saved_structure import first_difference


def seed_rank(seed: int, *, rank: int) -> None:
    """Gives torch's generators of each rank numbers of their own, for what an encoder draws in a step. Rank 0's generators stay as they are."""
    if rank > 0:
        torch.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0]))


def rng_state() -> dict[str, Any]:
    """Returns the state of Python's, numpy's and torch's generators, and of the current CUDA device's if there is one."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "python": [version, torch.tensor(words), gauss],
        # int64, because torch supports uint32 only in part.
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def rng_difference(state: object) -> str | None:
    """Returns why a state from a file is not one of `rng_state`, or None if it is. Sets nothing."""
    own = rng_state()
    if not isinstance(state, dict):
        return f"rng is {shown(state)}"
    devices = state.get("cuda"), own.pop("cuda")
    if wrong := first_difference({name: value for name, value in state.items() if name != "cuda"}, own, "rng"):
        return wrong
    if None not in devices and (wrong := first_difference(*devices, "rng.cuda")):
        return wrong
    # numpy accepts any position and would then read beyond its array.
    if not 0 <= state["numpy"][2] <= len(own["numpy"][1]):
        return f"rng.numpy.2 is {state['numpy'][2]}, must be in [0, {len(own['numpy'][1])}]"
    try:
        _set(state, python=random.Random(), numpy=np.random.RandomState(), torch_generator=torch.Generator())
    except (ValueError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        return f"rng: {error}"
    return None


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores the generators to a state from `rng_state`; CUDA's only if both machines have a GPU."""
    _set(state, python=random, numpy=np.random, torch_generator=torch.default_generator)
    if state.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _set(state: dict[str, Any], *, python: Any, numpy: Any, torch_generator: torch.Generator) -> None:
    version, words, gauss = state["python"]
    python.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch_generator.set_state(state["torch"])
