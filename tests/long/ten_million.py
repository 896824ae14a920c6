"""Measures what grows with the number of images: listing, converted tables, order, labels, start of a run; at 1e5, 1e6 and 1e7 rows.

python -m tests.long.ten_million --folder /big/scratch [--rows 100000 1000000 10000000] [--only beton train] [--keep]        (an hour)

The images are not there: a .beton and tar shards have true tables over files of holes, a folder has hard links to a few tiny files. Each
subject runs in a process of its own. It prints seconds and processor seconds of each phase, the process's largest memory, and for each phase
the exponent of the growth between the last two numbers of rows (1 is linear) beside the fitted seconds per million rows.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

ROWS = (100_000, 1_000_000, 10_000_000)
PER_CLASS = 10_000
SIDE_PX = 176
"""Side of the raw images of the synthetic .beton, of 93 kB each: as large as ImageNet's JPEGs."""
PAGE = 1 << 23
SHARD_IMAGES = 10_000
MOST_LINKS = 60_000
"""Hard links to one file: ext4 allows 65,000."""
SEED = 7


# ---------------------------------------------------------------------------------------------------------------- tables


def tiny_image(kind: str = "JPEG", level: int = 90) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB" if kind == "JPEG" else "L", (16, 16) if kind == "JPEG" else (1, 1), (level, 60, 160) if kind == "JPEG" else level).save(
        buffer, kind
    )
    return buffer.getvalue()


def labels_of(rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(rows, dtype=np.int64) // PER_CLASS


def class_names(rows: int) -> tuple[str, ...]:
    return tuple(f"n{number:08d}" for number in range(-(-rows // PER_CLASS)))


def manifest_of(kind: str, rows: int, shards: list[Any]) -> Any:
    from fastbyol.data.formats.manifest import Manifest, software_versions

    names = class_names(rows)
    counts = tuple(np.bincount(labels_of(rows), minlength=len(names)).tolist())
    settings, source = {"page_bytes": PAGE}, {"folder": "synthetic", "listing_sha256": ""}
    return Manifest(kind, rows, names, counts, {"bytes": 0.0}, settings, source, tuple(shards), software_versions())  # type: ignore[arg-type]


def make_beton(folder: Path, rows: int) -> Path:
    """Writes a .beton of black raw images, which are holes, with all of its tables."""
    from fastbyol.data.formats.beton import ALLOCATION, FIELD, HEADER, RAW_MODE, SAMPLE, VERSION, field_descriptors
    from fastbyol.data.formats.manifest import Shard, beton_manifest_path, write_manifest

    path = folder / f"{rows}.beton"
    if path.exists():
        return path
    size = 3 * SIDE_PX * SIDE_PX
    each = PAGE // size
    first = -(-(HEADER.itemsize + 2 * FIELD.itemsize + rows * SAMPLE.itemsize) // PAGE)
    row = np.arange(rows, dtype=np.uint64)
    pointer = (first + row // each) * PAGE + row % each * size
    end = int(pointer[-1]) + size
    samples = np.zeros(rows, dtype=SAMPLE)
    samples["f0"]["mode"], samples["f0"]["width"], samples["f0"]["height"] = RAW_MODE, SIDE_PX, SIDE_PX
    samples["f0"]["data_ptr"], samples["f1"] = pointer, labels_of(rows)
    allocation = np.zeros(rows, dtype=ALLOCATION)
    allocation["sample_id"], allocation["ptr"], allocation["size"] = row, pointer, size
    header = np.zeros(1, dtype=HEADER)
    header[0] = (VERSION, 2, PAGE, rows, end + 4 * rows)
    unfinished = path.with_suffix(".new")
    with unfinished.open("wb") as file:
        file.write(header.tobytes() + field_descriptors(checksums_at=end).tobytes())
        samples.tofile(file)
        file.seek(end)
        np.full(rows, zlib.crc32(bytes(size)), dtype="<u4").tofile(file)
        allocation.tofile(file)
        whole = file.tell()
    write_manifest(beton_manifest_path(path), manifest_of("beton", rows, [Shard(path.name, rows, whole, "")]))
    unfinished.replace(path)
    return path


def forget_tables(path: Path) -> Path:
    """Removes the tables that earlier processes have kept beside the data, so that the next one makes its own."""
    for table in (path if path.is_dir() else path.parent).glob(".fastbyol-table-*"):
        table.unlink()
    return path


def make_shards(folder: Path, rows: int) -> Path:
    """Writes tar shards of holes with one tiny JPEG in each 8 MiB, to which all samples of these point; sample table, indexes and manifest."""
    from fastbyol.data.formats.manifest import TAR_MANIFEST, Shard, write_manifest
    from fastbyol.data.formats.tar_shards import INDEX_VERSION, SAMPLE, SAMPLE_TABLE, index_path, shard_name

    out, jpeg = folder / f"{rows}-shards", tiny_image()
    if (out / TAR_MANIFEST).exists():
        return out
    out.mkdir(exist_ok=True)
    row = np.arange(rows)
    table, block = np.zeros(rows, dtype=SAMPLE), row % SHARD_IMAGES // 80
    table["shard"], table["offset"], table["size"] = row // SHARD_IMAGES, block * PAGE + 512, len(jpeg)
    table["crc32"], table["label"], table["height"], table["width"] = zlib.crc32(jpeg), labels_of(rows), 16, 16
    with (out / SAMPLE_TABLE).open("wb") as file:
        np.save(file, table)
    shards = []
    for number in range(rows // SHARD_IMAGES):
        tar, blocks = out / shard_name(number), SHARD_IMAGES // 80
        with tar.open("wb") as file:
            for each in range(blocks):
                file.seek(each * PAGE + 512)
                file.write(jpeg)
            file.truncate(blocks * PAGE)
        index_path(tar).write_text(f"{INDEX_VERSION} {SHARD_IMAGES}\n")
        shards.append(Shard(tar.name, SHARD_IMAGES, blocks * PAGE, ""))
    write_manifest(out / TAR_MANIFEST, manifest_of("tar", rows, shards))
    return out


def make_tree(folder: Path, rows: int) -> Path:
    """Makes class folders of hard links to tiny JPEGs."""
    tree, seeds = folder / f"{rows}-tree", folder / f"{rows}-seeds"
    if (seeds / "complete").exists():
        return tree
    shutil.rmtree(tree, ignore_errors=True)
    for place in (tree, seeds):
        place.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(class_names(rows)):
        (tree / name).mkdir()
        for image in range(number * PER_CLASS, min(rows, (number + 1) * PER_CLASS)):
            seed = seeds / f"{image // MOST_LINKS}.jpg"
            if image % MOST_LINKS == 0:
                seed.write_bytes(tiny_image())
            os.link(seed, tree / name / f"{name}_{image % PER_CLASS}.JPEG")
    (seeds / "complete").touch()
    return tree


def tree_names(rows: int) -> Iterator[str]:
    for number, name in enumerate(class_names(rows)):
        for image in range(min(PER_CLASS, rows - number * PER_CLASS)):
            yield f"{name}/{name}_{image}.JPEG"


def make_path_list(folder: Path, rows: int) -> Path:
    path = folder / f"{rows}-list.txt"
    if not path.exists():
        with path.open("w") as file:
            file.writelines(f"{rows}-tree/{name}\n" for name in tree_names(rows))
    make_tree(folder, rows)
    return path


def make_label_table(folder: Path, rows: int) -> Path:
    path = folder / f"{rows}-labels.csv"
    with path.open("w") as file:
        file.write("filename,label\n")
        file.writelines(f"{name},{name[:9]}\n" for name in tree_names(rows))
    make_tree(folder, rows)
    return path


def make_parquet(folder: Path, rows: int) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, png = folder / f"{rows}.parquet", tiny_image("PNG")
    if not path.exists():
        schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
        with pq.ParquetWriter(path, schema) as writer:
            for first in range(0, rows, 100_000):
                some = min(100_000, rows - first)
                writer.write_batch(
                    pa.record_batch([pa.array([png] * some), pa.array(labels_of(rows)[first : first + some])], schema=schema)
                )
    return path


def make_tars(folder: Path, rows: int) -> Path:
    """Writes WebDataset's shards, of one tiny image with a label member for each sample."""
    import tarfile

    out, png = folder / f"{rows}-tars", tiny_image("PNG")
    if (complete := folder / f"{rows}-tars.complete").exists():
        return out
    out.mkdir(exist_ok=True)

    def member(name: str, content: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)

    for first in range(0, rows, SHARD_IMAGES):
        with (out / f"{first // SHARD_IMAGES:05d}.tar").open("wb") as file:
            for row in range(first, min(rows, first + SHARD_IMAGES)):
                file.write(member(f"{row:09d}.png", png) + member(f"{row:09d}.cls", b"%d" % (row // PER_CLASS)))
            file.write(bytes(1024))
    complete.touch()
    return out


def make_tar_index(folder: Path, rows: int) -> Path:
    """Makes tars of holes and the index that reading their headers would have left."""
    from fastbyol.data.inputs.listing import stamp_of
    from fastbyol.data.inputs.tar import TarScan
    from fastbyol.data.inputs.tars import _INDEX, TarContent, _write_index
    from fastbyol.host.cache_files import cache_file

    out = folder / f"{rows}-indexed"
    if (complete := folder / f"{rows}-indexed.complete").exists():
        return out
    out.mkdir(exist_ok=True)
    paths, contents = [], []
    for first in range(0, rows, SHARD_IMAGES):
        path = out / f"{first // SHARD_IMAGES:05d}.tar"
        with path.open("wb") as file:
            file.truncate(SHARD_IMAGES * 2048)
        paths.append(path)
    for number, path in enumerate(paths):
        scan = TarScan(path)
        scan.names = [f"{row:09d}.png" for row in range(number * SHARD_IMAGES, (number + 1) * SHARD_IMAGES)]
        scan.offsets = array("q", range(512, 512 + SHARD_IMAGES * 2048, 2048))
        scan.sizes = array("q", [67]) * SHARD_IMAGES
        contents.append(TarContent.of_scan(path, stamp_of(path.stat()), scan))
    with cache_file(out, name=_INDEX, of=paths) as index:
        assert index is not None
        _write_index(index, contents)
    complete.touch()
    return out


# ---------------------------------------------------------------------------------------------------------------- what is measured


def memory(process: int | str = "self") -> dict[str, float]:
    """Returns MiB: 'peak' (largest resident so far), 'rss' and 'pss' (shared pages counted by share) now, 'private' of it."""
    found: dict[str, float] = {}
    with suppress(OSError, StopIteration, KeyError):  # a process that is ending has no memory any more
        status = Path(f"/proc/{process}/status").read_text().splitlines()
        found["peak"] = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        value = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in rollup[1:]}
        found |= {"rss": value["Rss"], "pss": value["Pss"], "private": value["Private_Clean"] + value["Private_Dirty"]}
    return {name: round(mib) for name, mib in found.items()}


class Phases:
    """Seconds, processor seconds and the process's largest memory after each phase."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"imports": memory()}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self.found[name] = {
            "wall_s": round(time.perf_counter() - start, 3),
            "cpu_s": round(time.process_time() - cpu, 3),
            "peak_mib": memory()["peak"],
        }

    def end(self) -> None:
        self.found["at the end"] = memory()
        print(json.dumps(self.found))


def order_digest(order: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    return f"{zlib.crc32(memoryview(np.ascontiguousarray(order, dtype=np.int64))):08x}"


def measure_loader(path: Path, rows: int, traversal: str = "random") -> None:
    import torch  # noqa: F401 (its memory is part of the imports)

    from fastbyol.config.schema import DataConfig
    from fastbyol.config.views import ViewPair
    from fastbyol.data import build_loader

    def build(data: Path) -> Any:
        views, config = ViewPair(size_px=16), DataConfig(train=str(data), workers=1, traversal=traversal)
        return build_loader(config, views=views, seed=SEED, global_batch=64, output="uint8")

    # Once with few rows, so that what is loaded and compiled on first use is not counted.
    with build(make_shards(path.parent, SHARD_IMAGES) if path.is_dir() else make_beton(path.parent, SHARD_IMAGES)) as few:
        next(iter(few))
    phase = Phases()
    with phase("open"):
        loader = build(path)
    with phase("class counts"):
        loader.class_counts()
    with phase("fingerprint"):
        told = loader.fingerprint()
    with phase("order of an epoch"):
        order = loader.traversal.order(0)
    told["order"] = order_digest(order)
    del order
    with phase("first batch"):
        batches = iter(loader)
        next(batches)
    phase.found["digests"] = told
    batches.close()  # type: ignore[attr-defined]
    loader.close()
    phase.end()


def measure_orders(path: Path, rows: int) -> None:
    from fastbyol.data.traversal import epoch_order, group_into_blocks, local_order

    phase = Phases()
    with phase("random order"):
        order = epoch_order(rows, seed=SEED, epoch=1)
    told = {"random": order_digest(order)}
    del order
    offset = np.arange(rows, dtype=np.int64) * 93_000
    with phase("blocks"):
        blocks = group_into_blocks(np.zeros(rows, dtype=np.int64), offset, block_bytes=PAGE, window_bytes=2048 << 20)
    with phase("local order"):
        order = local_order(blocks, seed=SEED, epoch=1)
    phase.found["digests"] = told | {"local": order_digest(order)}
    phase.end()


def measure_listing(path: Path, rows: int, labels: Path | None = None) -> None:
    from fastbyol.data.backends.folder_source import FolderSource
    from fastbyol.data.inputs.images import list_images

    phase = Phases()
    with phase("listing"):
        listing = list_images(path, labels=labels)
    phase.found["listed"] = memory()
    with phase("source and fingerprint"):
        told = FolderSource(listing).fingerprint()
    phase.found["digests"] = told
    assert len(listing.files) == rows, len(listing.files)
    phase.end()


def measure_train(path: Path, rows: int, ranks: int = 2) -> None:
    """Starts a run of two ranks and takes one step: seconds until its record, largest memory and PSS of each rank."""
    out = path.parent / f"{rows}-run"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "fastbyol", "train", "--preset", "cpu_demo"),
        *(
            "--data.train",
            str(path),
            "--out",
            str(out),
            "--steps",
            "3",
            "--log_every",
            "1",
            "--data.workers",
            "1",
            "--optim.warmup_epochs",
            "0",
        ),
        *("--model.hidden_dim", "16", "--model.projection_dim", "8", "--global_batch", "64"),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen: dict[int, dict[str, float]] = {}
    first_record = 0.0
    while process.poll() is None:
        for pid in ranks_of(process.pid):
            if now := memory(pid):
                before = seen.setdefault(pid, {})
                before |= {name: max(before.get(name, 0), mib) for name, mib in now.items()}
                if not first_record:
                    before["cpu_s"] = cpu_seconds(pid)
        if not first_record and any("step" in log.read_text(errors="replace") for log in out.glob("*.jsonl")):
            first_record = time.perf_counter() - began
        time.sleep(0.1)
    text = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {text[-3000:]}")
    start = {"wall_s": round(first_record, 2), "cpu_s": max(each.get("cpu_s", 0.0) for each in seen.values()), "peak_mib": 0}
    start["peak_mib"] = max(each["peak"] for each in seen.values())
    found: dict[str, Any] = {"start to the first step's record": start}
    found |= {f"rank {number}": each for number, each in enumerate(seen.values())}
    print(json.dumps(found))


def cpu_seconds(process: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def ranks_of(launcher: int) -> list[int]:
    with suppress(OSError):
        text = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return [int(pid) for pid in text if "fastbyol" in Path(f"/proc/{pid}/cmdline").read_text()]
    return []


SUBJECTS: dict[str, tuple[Callable[[Path, int], Path], Callable[[Path, int], None], str]] = {
    "orders": (lambda folder, rows: folder, measure_orders, "the two orders of an epoch"),
    "beton": (lambda folder, rows: forget_tables(make_beton(folder, rows)), measure_loader, "a .beton, opened for the first time"),
    "beton again": (make_beton, measure_loader, "a .beton, whose table another process has kept"),
    "local": (make_beton, lambda path, rows: measure_loader(path, rows, "local"), "a .beton, local traversal"),
    "shards": (lambda folder, rows: forget_tables(make_shards(folder, rows)), measure_loader, "converted tar shards, for the first time"),
    "train": (make_beton, measure_train, "a run of two ranks on a .beton"),
    "tree": (make_tree, measure_listing, "a folder of class folders"),
    "list": (make_path_list, measure_listing, "a list of paths"),
    "index": (make_tar_index, measure_listing, "WebDataset's shards without labels, from their index"),
    "tars": (make_tars, measure_listing, "WebDataset's shards, their headers"),
    "tars again": (make_tars, measure_listing, "WebDataset's shards, from their index"),
    "parquet": (make_parquet, measure_listing, "Parquet, copied to a tar"),
    "parquet again": (make_parquet, measure_listing, "Parquet, from the tar"),
    "labels": (
        make_label_table,
        lambda path, rows: measure_listing(path.with_name(f"{rows}-tree"), rows, path),
        "a folder with a table of labels",
    ),
}
LIMITS = dict.fromkeys(("tars", "tars again", "parquet", "parquet again", "labels"), 1_000_000)
"""Most rows of subjects that need gigabytes of disk a million rows, or whose file has a largest size."""


# ---------------------------------------------------------------------------------------------------------------- the report


def growth(seconds: dict[int, float]) -> str:
    """Returns the exponent of the growth between the last two numbers of rows, and the fitted seconds per million rows."""
    rows, values = np.array(list(seconds)), np.maximum(list(seconds.values()), 1e-3)
    if len(rows) < 2:
        return ""
    exponent = np.log(values[-1] / values[-2]) / np.log(rows[-1] / rows[-2])
    # Relative errors count alike at each size: fitted through seconds per row.
    design = np.stack([np.ones(len(rows)), rows], axis=1) / values[:, None]
    (_, slope), *_ = np.linalg.lstsq(design, np.ones(len(rows)), rcond=None)
    return f"{exponent:.2f} | {slope * 1e6:.2f}"


def report(subject: str, found: dict[int, dict[str, Any]]) -> None:
    print(f"\n### {subject}: {SUBJECTS[subject][2]}\n")
    sizes = list(found)
    print("| phase | " + " | ".join(f"{rows:,}: s (cpu), MiB" for rows in sizes) + " | exponent | s per 1e6 |")
    print("| --- |" + " --- |" * (len(sizes) + 2))
    for phase in next(iter(found.values())):
        rows = [found[size].get(phase, {}) for size in sizes]
        if all("wall_s" in row for row in rows):
            cells = [f"{row['wall_s']:.2f} ({row['cpu_s']:.2f}), {row['peak_mib']:.0f}" for row in rows]
            key = "cpu_s" if any(row["cpu_s"] for row in rows) else "wall_s"
            print(f"| {phase} | {' | '.join(cells)} | {growth({size: row[key] for size, row in zip(sizes, rows, strict=True)})} |")
        else:
            print(f"| {phase} | {' | '.join(', '.join(f'{name} {value}' for name, value in row.items()) for row in rows)} | | |")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, on a disk with holes and hard links (ext4, XFS)")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--keep", action="store_true", help="leave the tables in the folder for the next run")
    parser.add_argument("--measure", choices=SUBJECTS, help=argparse.SUPPRESS)
    parser.add_argument("--make", choices=SUBJECTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.make:
        SUBJECTS[options.make][0](options.folder, options.rows[0])
    elif options.measure:
        make, measure, _ = SUBJECTS[options.measure]
        measure(make(options.folder, options.rows[0]), options.rows[0])
    else:
        try:
            for subject in options.only:
                found = {}
                for rows in options.rows:
                    if rows > LIMITS.get(subject, rows):
                        continue
                    for step in ("--make", "--measure"):
                        command = [sys.executable, "-m", "tests.long.ten_million", "--folder", options.folder, "--rows", str(rows)]
                        done = subprocess.run([*map(str, command), step, subject], stdout=subprocess.PIPE, text=True, check=False)
                        if done.returncode:
                            print(f"{subject}, {rows:,} rows, {step}: exit code {done.returncode}", flush=True)
                            break
                    else:
                        found[rows] = json.loads(done.stdout.splitlines()[-1])
                if found:
                    report(subject, found)
        finally:
            if not options.keep:
                shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
