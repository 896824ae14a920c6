"""Human-readable byte counts and durations."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """Returns a byte count with three digits in decimal units, as disks are sold: '147 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def duration_text(seconds: float) -> str:
    """Returns a duration in its two largest units: '2 h 10 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def count_text(count: int, what: str) -> str:
    """Returns the count with its noun: '1 shard', '1,200 shards'."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")
