"""YAML of options, read with a bound on what it stands for: with aliases, or merges, 600 bytes can be gigabytes."""

from __future__ import annotations

import yaml

MAX_VALUES, MAX_DEPTH = 10_000, 20
"""A whole config has about a hundred values in three levels."""


class StandsForTooMuch(ValueError):
    """A text beyond the bounds on what it stands for."""


def read_yaml(text: str) -> object:
    """The plain values of one YAML document.

    Raises:
        ValueError: it is not YAML, or stands for more than MAX_VALUES values with its aliases written out, or more than MAX_DEPTH levels.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _written_out(node, depth=0, known={})
        return loader.construct_document(node)
    except RecursionError as error:
        raise StandsForTooMuch(f"more than {MAX_DEPTH} levels deep") from error
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)[:500]) from error


def repeated_key(text: str) -> str:
    """Returns the first key that stands twice in one mapping of a document that `read_yaml` has taken, with its dots, or ''."""
    return _repeated_key(yaml.compose(text, Loader=yaml.SafeLoader))


def _repeated_key(node: yaml.Node | None, prefix: str = "") -> str:
    names: set[str] = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        if name in names:
            return name
        names.add(name)
        if deeper := _repeated_key(value, f"{name}."):
            return deeper
    return ""


def _written_out(node: yaml.Node, *, depth: int, known: dict[int, int]) -> int:
    """How many values a node stands for, each alias counted as what it repeats; known: those of the nodes seen so far, by id."""
    if depth > MAX_DEPTH:  # an alias of a group inside that very group, too
        raise StandsForTooMuch(f"more than {MAX_DEPTH} levels deep")
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_written_out(each, depth=depth + 1, known=known) for each in inner)
    if known[id(node)] > MAX_VALUES:
        raise StandsForTooMuch(f"stands for more than {MAX_VALUES:,} values; write fewer aliases")
    return known[id(node)]
