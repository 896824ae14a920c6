"""The report of a conversion: a JSON file that names every changed, dropped or unusual image, and a short table of counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.conversion.encode import Outcome
from fastbyol.data.inputs.listing import ImageListing, left_out

_FORMAT = 1
# Requested by the user, or common and harmless: counted, but not named one by one.
_COUNTED = {Outcome.PASSED: "passed through", Outcome.RESIZED: "resized", Outcome.RAW: "stored as pixels"}


def make_report(listing: ImageListing, rows: NDArray[np.void], touched: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the report as plain values for JSON. It depends only on the images and the settings.

    Args:
        listing: listing of the source images.
        rows: one row per image, in any order (`image_pass.ROW`).
        touched: notes of the conversion (`image_pass.touched_images`), in any order.
    """
    outcomes = Counter(rows["outcome"].tolist())
    named = sorted(touched, key=lambda entry: (entry["index"], entry["outcome"], entry["reason"]))
    by_reason = {
        outcome: dict(sorted(Counter(entry["reason"] for entry in named if entry["outcome"] == outcome).items()))
        for outcome in ("transcoded", "dropped", "noted")
    }
    return {
        "format_version": _FORMAT,
        "images": len(rows),
        "kept": len(rows) - outcomes[Outcome.DROPPED],
        **{what.replace(" ", "_"): outcomes[outcome] for outcome, what in _COUNTED.items()},
        **by_reason,
        "icc_profiles_ignored": int((rows["has_icc"] != 0).sum()),
        "left_out_of_the_listing": [{"name": name, "reason": reason} for name, reason in listing.skipped],
        "touched": [{"name": listing.files[entry["index"]], **entry} for entry in named],
    }


def report_text(report: dict[str, Any]) -> str:
    """Returns the report as JSON, in pure ASCII so that names that are not valid UTF-8 are preserved and any reader can parse it."""
    return json.dumps(report, indent=1) + "\n"


def report_path(out: Path) -> Path:
    """Returns the path of the report for a .beton; a folder of shards contains its report."""
    return out.with_name(out.name + ".report.json")


def report_table(report: dict[str, Any]) -> str:
    """Returns a table with one line per outcome and reason, and its number of images."""
    lines = [("kept", report["kept"])]
    lines += [(f"  {what}", count) for what in _COUNTED.values() if (count := report[what.replace(" ", "_")])]
    lines += [(f"  transcoded: {reason}", count) for reason, count in report["transcoded"].items()]
    lines += [(f"  noted: {reason}", count) for reason, count in report["noted"].items()]
    if report["icc_profiles_ignored"]:
        lines.append(("  noted: ICC profile ignored", report["icc_profiles_ignored"]))
    lines += [(f"dropped: {reason}", count) for reason, count in report["dropped"].items()]
    reasons = left_out((entry["name"], entry["reason"]) for entry in report["left_out_of_the_listing"])
    lines += [(f"left out: {kind}", count) for kind, (count, _) in reasons.items()]
    width = max(len(what) for what, _ in lines)
    return "\n".join(f"{what:<{width}}  {count:>9,}" for what, count in lines)
