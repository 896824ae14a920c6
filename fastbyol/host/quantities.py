"""Human-readable byte counts and durations."""

from __future__ import annotations

from collections.abc import Sequence


def bytes_text(count: float) -> str:
    """Returns a byte count with three digits in decimal units, as disks are sold: '147 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def duration_text(seconds: float) -> str:
    """Returns a duration in its two largest units, leaving out zeros: '3 d 4 h', '2 h 5 min', '40 s'."""
    rest, parts = round(seconds), []
    for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "0 s"


def names_text(names: Sequence[str], *, most: int = 5) -> str:
    """Returns the first names as 'a, b, c', with ', …' if there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def count_text(count: int, what: str) -> str:
    """Returns the count with its noun: '1 shard', '1,200 shards'."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")
