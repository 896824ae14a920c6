"""Detects folders of splits (train, val, test). Taken for classes, they would put validation images into pre-training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from fastbyol.config.errors import UserError
from fastbyol.host.store_path import Place

_WORDS = frozenset(
    ("train", "training", "trainval", "val", "valid", "validation", "dev", "devel", "test", "testing", "eval", "evaluation", "holdout",
     "unlabeled", "unlabelled")
)  # fmt: skip
_AROUND = re.compile(r"^(?:images?|imgs?|data)[\W_]+|[\W_]*(?:set|data|images?|imgs?|split)?[\W_\d]*$")
"""Text that may precede or follow the word, as in 'train2017', 'test_set', 'images-val'."""
_LONGEST = 64
"""Longest name, in characters, that may be a split's: the time of the pattern's search grows with the third power of the length."""


def refuse_splits(root: Place, class_names: Sequence[str], names: Iterable[str]) -> None:
    """Raises UserError if folders of images are splits, at the top level or deeper.

    A single folder named 'train' may be a class (railway trains). It counts as a split if most of its images are in sub-folders.

    Args:
        root: the folder or tar.
        class_names: names of the top-level folders.
        names: names of the images; () if they are not known yet.
    """
    direct = Counter(name.rpartition("/")[0] for name in names)
    below: dict[str, set[str]] = {"": set(class_names)}
    for folder in direct:
        while folder:
            folder, _, last = folder.rpartition("/")
            if last in (inside := below.setdefault(folder, set())):
                break  # the folders above it are known too
            inside.add(last)
    for folder, found in sorted(below.items()):
        splits = sorted(name for name in found if is_split(name))
        several = len(set(map(_word, splits))) > 1  # 'test1' and 'test2' may be classes
        if not several and (alike := _alike_but_for_the_split(found)):
            several, splits = True, alike
        if not several and not folder:
            deeper = [name for name in direct if name.startswith(tuple(f"{split}/" for split in splits))]
            several = sum(direct[name] for name in splits) < sum(direct[name] for name in deeper)
        if several:
            place = root / folder if folder else root
            chosen = next((name for name in splits if "train" in name.lower()), splits[0])
            way_out = f"give one of them, such as {place / chosen}" if root.is_dir() else "unpack it and give one of its folders"
            raise UserError(
                f"{place}: holds splits ({', '.join(splits)}), not classes; {way_out}. If they are classes, convert with --splits-are-classes"
            )


def is_split(name: str) -> bool:
    """Returns True if the name is one that splits usually have, such as 'train2017'."""
    return len(name) <= _LONGEST and _word(name) in _WORDS


def _word(name: str) -> str:
    return _AROUND.sub("", name.lower())


def _alike_but_for_the_split(names: Iterable[str]) -> list[str]:
    """Returns names such as 'birds_train' and 'birds_val', or '1-train' and '2-test'; [] if no two names differ only in the split."""
    words: dict[tuple[str, ...], dict[str, str]] = {}
    for name in sorted(names):
        parts = re.findall("[a-z]+", re.sub(r"\s", "", name.lower()))  # 'train station' is one word
        for word in _WORDS.intersection(parts):
            words.setdefault(tuple(part for part in parts if part != word), {})[word] = name
    return next((sorted(named.values()) for named in words.values() if len(named) > 1), [])
