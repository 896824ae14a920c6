"""Reads YAML options with a limit on their expanded size: with aliases or merges, 600 bytes can expand to gigabytes."""

from __future__ import annotations

import yaml

MAX_VALUES, MAX_DEPTH = 10_000, 20
"""Limits on the expanded document; a whole config has about a hundred values in three levels."""


class StandsForTooMuch(ValueError):
    """A document that expands beyond the limits."""


def read_yaml(text: str) -> object:
    """Returns the plain values of one YAML document. Raises ValueError if it is none, or if its expanded form is beyond the limits."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        # Counted on the graph of nodes, in which an alias is a reference: construct_document would expand merges.
        _written_out(node, depth=0, known={})
        return loader.construct_document(node)
    except RecursionError as error:
        raise StandsForTooMuch(f"more than {MAX_DEPTH} levels deep") from error
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)[:500]) from error


def repeated_key(text: str) -> str:
    """Returns the dotted name of the first key that occurs twice in one mapping, or ''. `read_yaml` must have accepted the document."""
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
    """Returns how many values a node expands to, counting each alias in full. `known` caches the counts of nodes by id."""
    if depth > MAX_DEPTH:  # also catches a group that contains an alias of itself
        raise StandsForTooMuch(f"more than {MAX_DEPTH} levels deep")
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_written_out(each, depth=depth + 1, known=known) for each in inner)
    if known[id(node)] > MAX_VALUES:
        raise StandsForTooMuch(f"stands for more than {MAX_VALUES:,} values; write fewer aliases")
    return known[id(node)]
