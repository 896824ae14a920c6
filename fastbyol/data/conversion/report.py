"""The end of a conversion: checks that not too many images were dropped, and makes the report and the manifest.

The report is a JSON file that names every changed, dropped or unusual image; a short table shows its counts.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.conversion.encode import Outcome
from fastbyol.data.conversion.image_pass import kept_rows
from fastbyol.data.conversion.task import Task
from fastbyol.data.conversion.touched_images import TouchedImages
from fastbyol.data.formats.manifest import Manifest, Shard, image_summary, software_versions
from fastbyol.data.inputs.listing import ImageListing, left_out, names_digest
from fastbyol.host.durable_files import durable_file

_FORMAT = 1
_TOUCHED, _END = b' "touched": [', b"\n ]\n}\n"
"""Bytes before and after the list of the images that the report names."""
# Requested by the user, or common and harmless: counted, but not named one by one.
_COUNTED = {Outcome.PASSED: "passed through", Outcome.RESIZED: "resized", Outcome.RAW: "stored as pixels"}


def write_report(path: Path, task: Task, rows: NDArray[np.void], touched: TouchedImages) -> None:
    """Writes the report. Raises UserError if too many images were dropped, or all of a class; the work is kept for a run that allows it.

    Args:
        path: path of the report.
        task: the conversion.
        rows: one row per image, in any order (`image_pass.ROW`).
        touched: notes of the conversion.
    """
    outcomes = Counter(rows["outcome"].tolist())
    # It depends only on the images and the settings, so that a resumed conversion writes the same.
    report = {
        "format_version": _FORMAT,
        "images": len(rows),
        "kept": len(rows) - outcomes[Outcome.DROPPED],
        **{what.replace(" ", "_"): outcomes[outcome] for outcome, what in _COUNTED.items()},
        **{outcome: dict(sorted(reasons.items())) for outcome, reasons in touched.counts.items()},
        "icc_profiles_ignored": int((rows["has_icc"] != 0).sum()),
        "left_out_of_the_listing": [{"name": name, "reason": reason} for name, reason in task.listing.skipped],
    }
    named = (json.dumps({"name": task.listing.files[entry["index"]], **entry}) for entry in touched)
    with durable_file(path) as file:
        buffered = io.BufferedWriter(file)  # type: ignore[arg-type]  # a plain write of an unbuffered file may stop early
        # Pure ASCII, so that names that are not valid UTF-8 are preserved and any reader can parse it. The touched images come last and one
        # by one, because there may be as many as images.
        buffered.write(json.dumps(report, indent=1).removesuffix("\n}").encode("ascii") + b",\n" + _TOUCHED)
        for count, entry in enumerate(named):
            buffered.write((",\n  " if count else "\n  ").encode() + entry.encode("ascii"))
        buffered.write(_END)
        buffered.flush()
        buffered.detach()  # durable_file flushes it to the disk and closes it
    allowed = task.options.dropped_allowed(len(rows))
    dropped = outcomes[Outcome.DROPPED]
    advice = f"{path} names them. Nothing is lost: fix the images and start again with --restart, or allow it with"
    if dropped == len(rows):
        raise UserError(f"{task.listing.root}: none of the {len(rows):,} images can be kept; {path} says why")
    if dropped > allowed:
        share = math.ceil(1e4 * dropped / len(rows)) / 1e4  # rounded up, so that it works as a value of --max-dropped
        raise UserError(f"{dropped:,} of {len(rows):,} images were dropped, at most {allowed:,} may be; {advice} --max-dropped {share:g}")
    lost = Counter(task.listing.labels).keys() - _class_counts(task.listing, rows).keys() - {-1}
    if lost and task.options.max_dropped != 1 and len(rows) == len(task.listing.files):
        raise UserError(f"class {task.listing.class_names[min(lost)]} lost all of its images; {advice} --max-dropped 1")


def report_path(out: Path) -> Path:
    """Returns the path of the report for a .beton; a folder of shards contains its report."""
    return out.with_name(out.name + ".report.json")


def report_summary(path: Path) -> dict[str, Any]:
    """Returns a report without the images that it names, which are not read: there may be millions."""
    head: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            if line.startswith(_TOUCHED):
                break
            head.append(line)
    return json.loads(b"".join(head).rstrip().removesuffix(b",") + b"}")


def report_table(report: dict[str, Any]) -> str:
    """Returns a table with one line per outcome and reason, and its number of images. report: from `report_summary`."""
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


def make_manifest(kind: str, task: Task, rows: NDArray[np.void], shards: list[Shard], settings: Mapping[str, Any]) -> Manifest:
    """Returns the manifest of a finished conversion. rows: one per image, in sample order."""
    listing = task.listing
    kept = kept_rows(rows)
    counts = _class_counts(listing, rows)
    return Manifest(
        kind=kind,
        num_samples=len(kept),
        class_names=listing.class_names,
        class_counts=tuple(counts[label] for label in range(len(listing.class_names))),
        images=image_summary(kept["height"], kept["width"], kept["size"])
        | {"transcoded": int((kept["outcome"] == Outcome.TRANSCODED).sum())},
        settings=dict(settings),
        source={"folder": str(listing.root), "listing_sha256": task.listing_sha256},
        shards=tuple(shards),
        software=software_versions(),
        dropped=tuple(sorted(rows["index"][rows["outcome"] == Outcome.DROPPED].tolist())),
        names_sha256=names_digest(listing.names.take(kept["index"].astype(np.int64))),
    )


def _class_counts(listing: ImageListing, rows: NDArray[np.void]) -> Counter[int]:
    return Counter(listing.labels[index] for index in kept_rows(rows)["index"].tolist())
