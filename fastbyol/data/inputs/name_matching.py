"""Finds the images that a list of names means: a list made elsewhere names them with other folders in front, or with none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property


class NameIndex:
    """Images by name, or by the last part of their name where only one image has it, with or without its extension."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._full = {name: place for place, name in enumerate(files)}

    def find(self, name: str) -> int | None:
        """The image's place, or None where there is none, or more than one."""
        if name in self._full:
            return self._full[name]
        last = name.rpartition("/")[2]
        return self._by_last_part[last] if last in self._by_last_part else self._by_stem.get(last)

    # Made when a name needs them: each takes 150 MB for ImageNet.
    @cached_property
    def _by_last_part(self) -> dict[str, int | None]:
        return _only_unique(name.rpartition("/")[2] for name in self._files)

    @cached_property
    def _by_stem(self) -> dict[str, int | None]:
        return _only_unique(name.rpartition("/")[2].rpartition(".")[0] for name in self._files)


def _only_unique(words: Iterable[str]) -> dict[str, int | None]:
    places: dict[str, int | None] = {}
    for place, word in enumerate(words):
        places[word] = None if word in places else place
    return places
