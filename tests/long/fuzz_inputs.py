"""Feeds damaged and crafted files to everything that reads files: each must be taken, or refused in one line, within seconds.

python tests/long/fuzz_inputs.py [TARGET …] [--inputs 40000] [--seed 0]        (a quarter of an hour)
python tests/long/fuzz_inputs.py beton --seed 0 --only 1234                    (one input again, in this process)

Every input is a function of target, seed and number. A target runs in a process of its own, so that a crash or a hang (over 5 s) is found,
named and passed over. Exit code 1 if there was one, or an exception that is no UserError.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.data.backends.dali_source import DaliSource
from fastbyol.data.backends.ffcv_source import FfcvSource
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.encode import Encoder, EncodeSettings
from fastbyol.data.conversion.jpeg_scan import is_whole
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.formats import beton as beton_format
from fastbyol.data.formats.jpeg_header import jpeg_complaint, read_jpeg_header
from fastbyol.data.formats.manifest import read_manifest
from fastbyol.data.formats.pillow_decoding import UndecodableImage, decode_with_pillow
from fastbyol.data.formats.tar_shards import SAMPLE_TABLE
from fastbyol.data.formats.turbojpeg import TurboJpeg
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inspection.verification import verify

SECONDS_PER_INPUT = 5.0
MEMORY_BYTES = 8 << 30
GUARD = 1 << 14
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    127,
    128,
    255,
    256,
    1000,
    32767,
    32768,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
)
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    25,
    2**31,
    2**63,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    "../x",
    "/etc/passwd",
    "\0",
    "x" * 5000,
    [],
    {},
    [[]],
    [0],
    {"a": 1},
)


TENSORS = (
    lambda tensor: tensor.reshape(-1)[:1].clone(),
    lambda tensor: tensor.long(),
    lambda tensor: tensor.double(),
    lambda tensor: tensor[None],
    lambda tensor: tensor.to("meta"),
    lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.new_empty(0),
    lambda tensor: tensor.reshape(-1)[:1].expand(1 << 30) if tensor.numel() else tensor,
)
"""Other tensors in a tensor's place."""


# ---- mutations


def mutated_bytes(data: bytes, rng: random.Random, *, within: tuple[int, int] | None = None) -> bytes:
    """One to four changes, most of them within the given range of bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        low, high = within if within and rng.random() < 0.8 else (0, len(out))
        at = rng.randrange(low, max(min(high, len(out)), low + 1))
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind in (2, 3):
            size = rng.choice((1, 2, 4, 8))
            out[at : at + size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
        elif kind == 4:
            del out[at : at + rng.choice((1, 2, 8, 100, len(out)))]
        elif kind == 5:
            out[at:at] = out[at : at + rng.choice((1, 2, 16, 512))]
        elif kind == 6:
            out[at:at] = rng.randbytes(rng.choice((1, 2, 16)))
        else:
            out[at : at + 8] = bytes(8) if rng.random() < 0.5 else b"\xff" * 8
    return bytes(out)


def mutated_values(values: Any, rng: random.Random) -> Any:
    """Plain values with one to three places changed, left out, repeated or nested."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = _place(values, rng)
        if holder is None:
            return rng.choice(VALUES)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 2:
            holder[key] = [holder[key]]
        elif hasattr(holder[key], "numpy"):
            holder[key] = rng.choice(TENSORS)(holder[key])
        elif kind == 3 and type(holder[key]) is int:
            holder[key] += rng.choice((-1, 1, 2**16, -(2**31), 10**12))
        elif kind == 4 and isinstance(holder[key], str):
            holder[key] = holder[key] + rng.choice(("/", "\0", "x", "\x1b[8m", "é"))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return values


def _place(values: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random container within the values, and a key of it."""
    holder, key = None, None
    node = values
    while isinstance(node, dict | list) and node:
        holder, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = node[key]
        if rng.random() < 0.3:
            break
    return holder, key


# ---- what is attacked: each makes its good files in a folder, and returns a function of (folder, random numbers)

Attack = Callable[[random.Random], None]


def images(folder: Path, *, count: int = 4) -> Path:
    for label in "abc":
        (folder / label).mkdir(parents=True)
        for number in range(count):
            coarse = np.random.default_rng(number + ord(label)).integers(0, 256, (4, 5, 3), dtype=np.uint8)
            side = 20 + 3 * number
            Image.fromarray(coarse).resize((side + 7, side)).save(folder / label / f"{number}.jpg", quality=80, progressive=number == 1)
    return folder


def beton(folder: Path) -> Attack:
    """The header, the table of samples and the allocation table of a .beton, with and without its manifest."""
    good = folder / "good.beton"
    write_beton(images(folder / "images"), out=good, workers=1)
    content = good.read_bytes()
    header = np.frombuffer(content, beton_format.HEADER, 1)[0]
    table_at = beton_format.HEADER.itemsize + 2 * beton_format.FIELD.itemsize
    table = table_at, table_at + int(header["num_samples"]) * beton_format.SAMPLE.itemsize
    places = ((0, 24), table, table, (int(header["alloc_table_ptr"]), len(content)), (24, 24 + 40))
    path = folder / "x.beton"

    def attack(rng: random.Random) -> None:
        changed = mutated_bytes(content, rng, within=rng.choice(places))
        # Only the start and the end are rewritten: between them lie 8 MiB of mostly nothing.
        path.write_bytes(changed)
        manifest = Path(f"{path}.json")
        manifest.unlink(missing_ok=True)
        if rng.random() < 0.3:
            shutil.copy(f"{good}.json", manifest)
        if rng.random() < 0.05:
            verify(path, workers=1)
        decoded_twice(FfcvSource(path))

    return attack


def decoded_twice(source: FfcvSource) -> None:
    """Decodes everything into memory of two different contents: what stays of it shows."""
    try:
        indices = np.arange(source.num_samples)
        results = []
        for filling in (0x5A, 0xC3):
            pixels = []
            for index in indices:
                try:
                    source._scratch.pixels(100, 34)[:] = filling
                    pixels.append(next(source.decode(np.array([index]))).copy())
                except UserError:
                    pixels.append(np.zeros(1, dtype=np.uint8))
            results.append(pixels)
        for first, second in zip(*results, strict=True):
            assert first.shape == second.shape, "two decodes differ in size"
            assert (first == second).all(), "memory from before shows in an image"
    finally:
        source.close()


def shards(folder: Path) -> Attack:
    """The sample table and the manifest of tar shards."""
    good, bad = folder / "good", folder / "bad"
    write_tar_shards(images(folder / "images"), out=good, workers=1)
    shutil.copytree(good, bad)
    table, manifest = (good / SAMPLE_TABLE).read_bytes(), json.loads((good / "manifest.json").read_text())

    def attack(rng: random.Random) -> None:
        for name in (SAMPLE_TABLE, "manifest.json"):
            shutil.copy(good / name, bad / name)
        if rng.random() < 0.7:
            (bad / SAMPLE_TABLE).write_bytes(mutated_bytes(table, rng))
        else:
            (bad / "manifest.json").write_text(json.dumps(mutated_values(manifest, rng)))
        if rng.random() < 0.05:
            verify(bad, workers=1)
        source = DaliSource(bad)
        try:
            for index in range(source.num_samples):
                source.jpeg(index)
        finally:
            source.close()

    return attack


def manifest(folder: Path) -> Attack:
    """A manifest as JSON values and as bytes."""
    write_tar_shards(images(folder / "images"), out=folder / "good", workers=1)
    text = (folder / "good" / "manifest.json").read_bytes()
    fields = json.loads(text)
    path = folder / "manifest.json"

    def attack(rng: random.Random) -> None:
        path.write_bytes(mutated_bytes(text, rng) if rng.random() < 0.3 else json.dumps(mutated_values(fields, rng)).encode())
        read_manifest(path)

    return attack


def tar(folder: Path) -> Attack:
    """A tar of class folders with links and long names, a tar of class tars, and two tars one after another."""
    source = images(folder / "images", count=2)
    (source / "a" / ("n" * 120 + ".jpg")).write_bytes((source / "a" / "0.jpg").read_bytes())
    os.link(source / "a" / "0.jpg", source / "b" / "hard.jpg")
    (source / "c" / "soft.jpg").symlink_to("../a/0.jpg")
    goods = []
    for form in ("gnu", "pax", "ustar"):
        names = ["-C", str(source), "a", "b", "c"] if form != "ustar" else ["-C", str(source), "b"]
        subprocess.run(["tar", f"--format={form}", "-cf", folder / f"{form}.tar", *names], check=True)
        goods.append((folder / f"{form}.tar").read_bytes())
    for name in "ab":
        subprocess.run(["tar", "-cf", folder / f"{name}.tar", "-C", source / name, "."], check=True)
    subprocess.run(["tar", "-cf", folder / "outer.tar", "-C", folder, "a.tar", "b.tar"], check=True)
    goods += [(folder / "outer.tar").read_bytes(), goods[0] + goods[2]]
    path = folder / "x.tar"

    def attack(rng: random.Random) -> None:
        good = rng.choice(goods)
        header = rng.randrange(0, len(good), 512)
        changed = bytearray(mutated_bytes(good, rng, within=(header, header + 512)))
        if rng.random() < 0.7 and len(changed) >= header + 512:  # a header whose checksum fits gets further
            changed[header + 148 : header + 156] = b" " * 8
            changed[header + 148 : header + 156] = b"%06o\0 " % (sum(changed[header : header + 512]) % 8**6)
        path.write_bytes(changed)
        listing = list_images(path)
        for index in range(len(listing.files)):
            with contextlib.suppress(OSError):
                listing.location(index).read()

    return attack


LABEL_FILES = (
    "filename,label\n" + "".join(f"{n}.jpg,{'ab'[n % 2]}\n" for n in range(6)),
    "".join(f"{n}.jpg {n % 3}\n" for n in range(6)),
    "".join(f"./pool/{n}.jpg\tclass {n % 2}\n" for n in range(6)),
    '"path","label","score"\r\n' + "".join(f'"/data/{n}.jpg","x, y{n % 2}",0.{n}\r\n' for n in range(6)),
    "\ufefffile;class\n" + "".join(f"{n}.jpg;{n % 2}\n" for n in range(6)),
    "".join(f"{n % 2}\n" for n in range(6)),
)


def labels(folder: Path) -> Attack:
    """Files of labels as CSV and as text, and lists of names."""
    pool = folder / "pool"
    pool.mkdir()
    for n in range(6):
        (pool / f"{n}.jpg").write_bytes(b"\xff\xd8")
    paths = [folder / f"labels.{extension}" for extension in ("csv", "txt", "tsv")]
    words = [
        b",",
        b";",
        b"\t",
        b" ",
        b'"',
        b"\r\n",
        b"\n\n",
        b"#",
        b"./",
        b"../",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\0",
        b"0.jpg",
        b"label",
        b"-1",
        b"1e9",
    ]

    def attack(rng: random.Random) -> None:
        content = rng.choice(LABEL_FILES).encode()
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(content) + 1)
            content = content[:at] + rng.choice(words) + content[at + rng.randrange(3) :]
        if rng.random() < 0.5:
            content = mutated_bytes(content, rng)
        path = rng.choice(paths)
        path.write_bytes(content)
        listing = list_images(pool, labels=path) if rng.random() < 0.8 else list_images(folder, subset=path)
        assert len(listing.labels) == len(listing.files)
        allowed = range(len(listing.class_names)) if listing.class_names else (-1,)
        assert all(label in allowed for label in listing.labels)

    return attack


def jpeg(folder: Path) -> Attack:
    """JPEG headers and scans, by each of our readers; decoders must stay within their memory and fill it."""
    goods = []
    for number, (mode, options) in enumerate(
        [
            ("RGB", {}),
            ("L", {}),
            ("RGB", {"progressive": True}),
            ("CMYK", {}),
            ("RGB", {"subsampling": 0, "optimize": True}),
            ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"}),
        ]
    ):
        buffer = io.BytesIO()
        coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).convert(mode).resize((43, 30)).save(buffer, "JPEG", quality=85, **options)
        goods.append(buffer.getvalue())
    encoder = Encoder(EncodeSettings(max_pixels=1_000_000))
    decoder = TurboJpeg()
    is_whole(goods[0])  # the first call compiles, which may take longer than an input is given
    memory = np.zeros(30 * 43 * 3 + GUARD, dtype=np.uint8)
    out = memory[: 30 * 43 * 3].reshape(30, 43, 3)

    def attack(rng: random.Random) -> None:
        good = rng.choice(goods)
        data = mutated_bytes(good, rng, within=(0, good.index(b"\xff\xda") + 20) if rng.random() < 0.7 else None)
        read_jpeg_header(data)
        jpeg_complaint(data, height=30, width=43)
        is_whole(data)
        encoder.encode(data)
        results = []
        for filling in (0x5A, 0xC3):
            memory[:] = filling
            complaint, fatal = decoder.decode(data, out)
            assert (memory[out.size :] == filling).all(), "the decoder wrote past its memory"
            results.append(None if fatal else out.copy())
        if results[0] is not None and results[1] is not None:
            assert (results[0] == results[1]).all(), f"memory from before shows in an image ({complaint})"
        if rng.random() < 0.2:
            decode_with_pillow(data)

    return attack


def picture(folder: Path) -> Attack:
    """PNG, WebP, GIF, TIFF, BMP, PPM and JPEG 2000 files."""
    coarse = Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((33, 20))
    goods = []
    for kind, mode in (
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("TIFF", "RGB"),
        ("TIFF", "I"),
        ("TIFF", "F"),
        ("BMP", "RGB"),
        ("PPM", "L"),
        ("JPEG2000", "RGB"),
    ):
        buffer = io.BytesIO()
        (coarse.convert("L").convert("I;16") if mode == "I;16" else coarse.convert(mode)).save(buffer, kind)
        goods.append(buffer.getvalue())
    encoder = Encoder(EncodeSettings(max_pixels=1_000_000))

    def attack(rng: random.Random) -> None:
        good = rng.choice(goods)
        data = mutated_bytes(good, rng, within=(0, min(200, len(good))))
        encoder.encode(data)
        if not data.startswith(b"\xff\xd8"):  # without the encoder's limit of pixels
            header_only = len(data) > 33 and data[:4] == b"\x89PNG" and zlib.crc32(data[12:29]) == int.from_bytes(data[29:33])
            if header_only and int.from_bytes(data[16:20]) * int.from_bytes(data[20:24]) > 10**6:
                return
            decode_with_pillow(data)

    return attack


def checkpoint(folder: Path) -> Attack:
    """A run's newest checkpoint, as bytes and as values: it is continued from, or from the one before, or refused."""
    import torch

    from fastbyol.ranks.process_group import Process
    from fastbyol.run.checkpoint import checkpoint_path, save_checkpoint
    from fastbyol.run.command_line import parse_train_config
    from fastbyol.run.folder import open_run_folder
    from fastbyol.train import build

    torch.set_num_threads(1)
    model = ["--model.encoder", "resnet8", "--model.stem", "small2", "--model.hidden_dim", "8", "--model.projection_dim", "4"]
    options = ["--data.train", str(images(folder / "images")), "--out", str(folder / "run"), "--global_batch", "4", "--data.workers", "1"]
    config = parse_train_config(["--preset", "cpu_demo", *options, *model, "--views.size_px", "32"], usage="")
    process = Process(0, 1, torch.device("cpu"))
    state = build(config, process)
    run = open_run_folder(config)
    for group in state.optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    state.optimizer.step()
    good = state.snapshot(step=1, config=config, process=process)
    save_checkpoint(run, step=1, state=good, keep=9)
    content = checkpoint_path(run, 1).read_bytes()
    newest = checkpoint_path(run, 2)

    def attack(rng: random.Random) -> None:
        if rng.random() < 0.4:
            newest.write_bytes(mutated_bytes(content, rng))
            newest.with_suffix(".sha256").unlink(missing_ok=True)
        else:
            changed = mutated_values(good | {"step": 2}, rng)
            buffer = io.BytesIO()
            torch.save(changed, buffer)
            newest.write_bytes(buffer.getvalue())
            newest.with_suffix(".sha256").write_text(hashlib.sha256(buffer.getvalue()).hexdigest() + "\n")
        step = state.restore(run, config=config, process=process)
        assert step in (1, 2)
        state.optimizer.step()

    return attack


def weights(folder: Path) -> Attack:
    """A stranger's weights as .npz (stored and compressed), .safetensors and .pt: read, or refused."""
    import torch
    from safetensors.torch import save_file

    from fastbyol.run.weights_files import read_weights

    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    arrays = {f"layer{n}.weight": np.arange(40, dtype=kind).reshape(5, 8) for n, kind in enumerate(("float32", "float16", "int64"))}
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    np.savez(folder / "stored.npz", **arrays)  # pyright: ignore[reportArgumentType]
    np.savez_compressed(folder / "compressed.npz", **arrays)  # pyright: ignore[reportArgumentType]
    save_file(tensors, folder / "good.safetensors")
    torch.save(tensors, folder / "good.pt")
    contents = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    def attack(rng: random.Random) -> None:
        path = rng.choice([*contents, folder / "stored.npz"])
        content = contents[path]
        # A zip's directory is at its end, the header of a .npy behind its local header, safetensors' header at the start.
        within = rng.choice([(0, 200), (len(content) - 300, len(content)), None])
        damaged = folder / f"damaged{path.suffix}"
        damaged.write_bytes(mutated_bytes(content, rng, within=within))
        found = read_weights(damaged, option="checkpoint")
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.values()) or path.suffix == ".pt"

    return attack


TARGETS: dict[str, Callable[[Path], Attack]] = {
    "beton": beton,
    "shards": shards,
    "manifest": manifest,
    "tar": tar,
    "labels": labels,
    "jpeg": jpeg,
    "picture": picture,
    "checkpoint": checkpoint,
    "weights": weights,
}


# ---- running


def tried(attack: Attack, target: str, *, seed: int, number: int) -> str:
    """'taken' or 'refused'; raises whatever should not have come."""
    rng = random.Random(f"{target} {seed} {number}")
    try:
        attack(rng)
    except (UserError, UndecodableImage) as error:
        if len(str(error)) > 2000:
            raise AssertionError(f"a refusal of {len(str(error)):,} characters") from error
        return "refused"
    return "taken"


def serve(target: str, *, seed: int, first: int, last: int, journal: Path) -> None:
    """Tries inputs in this process; the journal holds the number under way, and in the end the counts."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    counts: Counter[str] = Counter()
    faults: list[str] = []
    place = os.open(f"{journal}.at", os.O_RDWR | os.O_CREAT)
    with tempfile.TemporaryDirectory() as folder:
        attack = TARGETS[target](Path(folder))
        for number in range(first, last):
            os.pwrite(place, b"%12d" % number, 0)
            signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_INPUT)
            try:
                counts[tried(attack, target, seed=seed, number=number)] += 1
            except Exception as error:
                counts["faults"] += 1
                faults.append(f"{target} {number}: {type(error).__name__}: {str(error)[:150]}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if number % 500 == 0:
                journal.write_text(json.dumps([counts, faults]))
    journal.write_text(json.dumps([counts, faults]))


def run(target: str, *, inputs: int, seed: int) -> tuple[Counter[str], list[str]]:
    """All inputs of a target, in as many processes as it takes."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        while first < inputs:
            journal = Path(folder) / f"{first}"
            command = [sys.executable, __file__, target, "--seed", str(seed), "--serve", str(first), str(inputs), str(journal)]
            code = subprocess.run(command, check=False).returncode
            if journal.exists():
                more, found = json.loads(journal.read_text())
                counts += Counter(more)
                faults += found
            if code == 0:
                break
            at = Path(f"{journal}.at")
            if not at.exists() or not at.read_bytes():
                faults.append(f"{target}: its process did not start (exit code {code})")
                break
            number = int(at.read_bytes())
            counts["crashes or hangs"] += 1
            faults.append(f"{target} {number}: " + ("no end after 5 s" if code == -signal.SIGALRM else f"the process ended with {code}"))
            first = number + 1
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--inputs", type=int, default=40_000, help="of each target (default: 40000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input, in this process, with its traceback")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    targets = arguments.targets or list(TARGETS)
    if arguments.serve:
        first, last, journal = arguments.serve
        return serve(targets[0], seed=arguments.seed, first=int(first), last=int(last), journal=Path(journal))
    if arguments.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(tried(TARGETS[targets[0]](Path(folder)), targets[0], seed=arguments.seed, number=arguments.only))
        return None
    total: Counter[str] = Counter()
    all_faults: list[str] = []
    for target in targets:
        start = time.monotonic()
        counts, faults = run(target, inputs=arguments.inputs, seed=arguments.seed)
        print(f"{target:10} {dict(counts)} in {time.monotonic() - start:.0f} s", *faults[:20], sep="\n  ", flush=True)
        total += counts
        all_faults += faults
    print(f"{sum(total.values()):,} inputs: {dict(total)}")
    sys.exit(1 if all_faults else 0)


if __name__ == "__main__":
    main()
