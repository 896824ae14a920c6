"""Files of features: one row for each image that decodes, with its name, its label and where all of it comes from.

.parquet: columns name, label, feature, projection; the facts are in the schema's metadata under 'fastbyol'.
.npz: arrays name, label, feature, projection, and facts (JSON text).
.npy: the features alone; names, labels and facts lie beside it in .json (features.npy, features.json), projections in .projection.npy.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError, first_line
from fastbyol.data.formats.tar_shards import listed_position
from fastbyol.host.durable_files import durable_file, write_durably

SUFFIXES = (".parquet", ".npz", ".npy")
DTYPES = ("float32", "float16")
_FACTS = "facts"
_BUFFER_BYTES = 1 << 20
_MOST_IMAGES = 2**48
_BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,
)
"""Exceptions that numpy, zipfile, json and pyarrow raise on damaged files; pyarrow's errors are subclasses of these."""


class Rows(NamedTuple):
    """Rows of features. feature: (n, D). projection: (n, P), or None."""

    feature: NDArray[Any]
    projection: NDArray[Any] | None


@dataclass(frozen=True)
class Facts:
    """Origin of the features in a file.

    weights: digest of the encoder's tensors. fingerprint: of the data set's loader. num_images: rows of the file. damaged: indices in the data,
    ascending, of images that have no row because they do not decode.
    """

    checkpoint: str
    step: int
    weights: str
    encoder: str
    changes: dict[str, Any]
    data: str
    labels: str
    fingerprint: dict[str, str]
    num_images: int
    class_names: list[str]
    size_px: int
    interpolation: str
    antialias: bool
    mean: list[float]
    std: list[float]
    crop: str
    dtype: str
    feature_dim: int
    projection_dim: int
    version: str
    damaged: list[int]

    def index_of(self, row: int) -> int:
        """Returns the index in the data of the image of this row."""
        return listed_position(row, np.array(self.damaged, dtype=np.int64))

    @classmethod
    def read(cls, text: str | bytes) -> Facts:
        """Returns the facts in a JSON object. Raises ValueError or TypeError if it is not what `write` writes."""
        values = json.loads(text)
        if isinstance(values, dict):
            values.setdefault("damaged", [])  # files of an earlier version have a row for every image
        if not isinstance(values, dict) or {field.name for field in fields(cls)} - values.keys():
            raise ValueError("it has no facts of fastbyol")
        for field in fields(cls):
            kind = str(field.type).partition("[")[0]
            if type(values[field.name]).__name__ != kind:
                raise ValueError(f"its {field.name} is not a {kind}")
        damaged = values["damaged"]
        if not all(type(index) is int and 0 <= index < _MOST_IMAGES for index in damaged) or damaged != sorted(set(damaged)):
            raise ValueError("its damaged are not ascending indices")
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def text(self) -> str:
        return json.dumps(asdict(self))


def check_output(out: Path) -> None:
    """Raises UserError unless the file can be written: its suffix is one of SUFFIXES, what it needs is installed, nothing is in its place,
    and its folder may be written.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: must end in {', '.join(SUFFIXES)}")
    if out.suffix == ".parquet":
        _pyarrow()
    # An embedding that was killed here may have left the files beside an .npy.
    beside = (_facts_beside(out), _projections(out)) if out.suffix == ".npy" and not work_path(out).exists() else ()
    for path in (out, *beside):
        if path.exists():
            raise UserError(f"--out {path}: exists already; remove it or choose another file")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it or choose another")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: you may not write into the folder {out.parent}; choose another")


def work_path(out: Path) -> Path:
    """Returns the hidden folder beside a file of features that holds its parts until it is complete."""
    return out.with_name(f".{out.name}.partial")


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "pyarrow, which reads and writes .parquet, is not installed; pip install 'fastbyol[parquet]', or use .npz"
        ) from error
    return pyarrow


def valid_text(name: str) -> str:
    r"""Returns a name as UTF-8 can hold it: bytes of file names that are not UTF-8 become \xff."""
    return name.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")


# ---- writing


def write_features(out: Path, parts: Iterator[Rows], *, names: Sequence[str], labels: NDArray[np.int64], facts: Facts) -> None:
    """Writes all parts, in order, to a new file, which appears complete or not at all. Holds one part in memory at a time."""
    names = [valid_text(name) for name in names]
    writer = {".parquet": _write_parquet, ".npz": _write_npz, ".npy": _write_npy}[out.suffix]
    writer(out, parts, names, labels, facts)


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file that gets its name when the block ends, buffered: an unbuffered one may take less than it is given."""
    with durable_file(path) as raw:
        file = io.BufferedWriter(cast(io.RawIOBase, raw), _BUFFER_BYTES)
        yield cast(IO[bytes], file)
        file.detach()  # flushes, and leaves closing to durable_file


def _write_parquet(out: Path, parts: Iterator[Rows], names: Sequence[str], labels: NDArray[np.int64], facts: Facts) -> None:
    pa = _pyarrow()
    value = {"float32": pa.float32(), "float16": pa.float16()}[facts.dtype]
    columns = [("name", pa.string()), ("label", pa.int64()), ("feature", pa.list_(value, facts.feature_dim))]
    if facts.projection_dim:
        columns.append(("projection", pa.list_(value, facts.projection_dim)))
    schema = pa.schema(columns, metadata={"fastbyol": facts.text()})
    with _new_file(out) as file, pa.parquet.ParquetWriter(pa.PythonFile(file, mode="w"), schema) as writer:
        done = 0
        for part in parts:
            end = done + len(part.feature)
            arrays = [pa.array(names[done:end], pa.string()), pa.array(labels[done:end])]
            for block in (part.feature, part.projection):
                if block is not None:
                    arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), block.shape[1]))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            done = end


def _write_npz(out: Path, parts: Iterator[Rows], names: Sequence[str], labels: NDArray[np.int64], facts: Facts) -> None:
    held: list[NDArray[Any]] = []
    with _new_file(out) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("feature.npy", "w", force_zip64=True) as member:
            _write_header(member, (facts.num_images, facts.feature_dim), facts.dtype)
            for part in parts:
                member.write(part.feature.tobytes())
                if part.projection is not None:  # a few hundred numbers a row; a zip file takes one member at a time
                    held.append(part.projection)
        small = {"name": np.array(names, dtype=np.str_), "label": labels, _FACTS: np.array(facts.text())}
        for name, array in (small | ({"projection": np.concatenate(held)} if held else {})).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_npy(out: Path, parts: Iterator[Rows], names: Sequence[str], labels: NDArray[np.int64], facts: Facts) -> None:
    # The features last: a features.npy that is there has everything beside it.
    with ExitStack() as files:
        file = files.enter_context(_new_file(out))
        _write_header(file, (facts.num_images, facts.feature_dim), facts.dtype)
        projection = None
        if facts.projection_dim:
            projection = files.enter_context(_new_file(_projections(out)))
            _write_header(projection, (facts.num_images, facts.projection_dim), facts.dtype)
        for part in parts:
            file.write(part.feature.tobytes())
            if projection is not None and part.projection is not None:
                projection.write(part.projection.tobytes())
        beside = {"names": list(names), "labels": labels.tolist(), _FACTS: asdict(facts)}
        write_durably(_facts_beside(out), json.dumps(beside))


def _write_header(file: IO[bytes], shape: tuple[int, int], dtype: str) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)


def _facts_beside(out: Path) -> Path:
    return out.with_suffix(".json")


def _projections(out: Path) -> Path:
    return out.with_suffix(".projection.npy")


# ---- reading


class FeatureFile:
    """A file of features, opened: `facts`, `names` and `labels` in memory, the features read in blocks."""

    def __init__(self, path: str | Path) -> None:
        """Opens the file.

        Raises:
            UserError: no such file, damaged, or not one that `embed` wrote. Nothing in it is unpickled.
        """
        self.path = Path(path)
        if self.path.suffix not in SUFFIXES:
            raise UserError(f"{path}: no file of features: expected {', '.join(SUFFIXES)}, as python -m fastbyol embed writes them")
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; make it with python -m fastbyol embed")
        opened = {".parquet": self._open_parquet, ".npz": self._open_npz, ".npy": self._open_npy}[self.path.suffix]
        try:
            self.facts, self.names, self.labels = opened()
            if not len(self.names) == len(self.labels) == self.facts.num_images:
                raise ValueError(f"{len(self.names)} names and {len(self.labels)} labels for {self.facts.num_images} images")
        except UserError:  # which is a ValueError, and says what is missing
            raise
        except _BROKEN as error:
            raise self._broken(error) from error

    facts: Facts
    names: list[str]
    """(N) names in the listing of the data."""
    labels: NDArray[np.int64]
    """(N,) class of each image, a position in `facts.class_names`; -1 for none."""

    def blocks(self, column: str = "feature", *, rows: int = 8192) -> Iterator[NDArray[Any]]:
        """Yields the rows of 'feature' or 'projection' in order, (n, D) each. Raises UserError if the file is damaged."""
        width = self.facts.feature_dim if column == "feature" else self.facts.projection_dim
        if not width:
            raise UserError(f"{self.path}: holds no {column}; embed again with --projection")
        done = 0
        blocks = self._blocks(column, rows)
        while True:
            try:
                block = next(blocks, None)
                if block is None:
                    break
                if block.ndim != 2 or block.shape[1] != width or block.dtype != self.facts.dtype:
                    raise ValueError(f"rows of {block.dtype} {block.shape[1:]}, its facts say {self.facts.dtype} ({width},)")
            except _BROKEN as error:
                raise self._broken(error) from error
            done += len(block)
            yield block
        if done != self.facts.num_images:
            raise self._broken(ValueError(f"{done} rows for {self.facts.num_images} images"))

    def read(self, column: str = "feature") -> NDArray[Any]:
        """Returns all rows of 'feature' or 'projection', (N, D)."""
        return np.concatenate(list(self.blocks(column)))

    def _broken(self, error: BaseException) -> UserError:
        what = first_line(error) if isinstance(error, Exception) else str(error)
        return UserError(f"{self.path}: is not a complete file of features ({what}); make it again with python -m fastbyol embed")

    def _open_parquet(self) -> tuple[Facts, list[str], NDArray[np.int64]]:
        pa = _pyarrow()
        with pa.parquet.ParquetFile(self.path) as file:
            held = file.schema_arrow.metadata or {}
            if b"fastbyol" not in held:
                raise ValueError("it has no facts of fastbyol")
            table = file.read(columns=["name", "label"])
        return Facts.read(held[b"fastbyol"]), table["name"].to_pylist(), table["label"].to_numpy().astype(np.int64)

    def _open_npz(self) -> tuple[Facts, list[str], NDArray[np.int64]]:
        with np.load(self.path, allow_pickle=False) as arrays:
            if missing := {_FACTS, "name", "label", "feature"} - set(arrays.files):
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            return Facts.read(str(arrays[_FACTS])), arrays["name"].tolist(), arrays["label"].astype(np.int64)

    def _open_npy(self) -> tuple[Facts, list[str], NDArray[np.int64]]:
        beside = _facts_beside(self.path)
        if not beside.is_file():
            raise UserError(f"{self.path}: its names are missing; {beside.name} must lie beside it, as python -m fastbyol embed writes it")
        held = json.loads(beside.read_text(encoding="utf-8"))
        names = held["names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its names are not strings")
        return Facts.read(json.dumps(held[_FACTS])), names, np.array(held["labels"], dtype=np.int64)

    def _blocks(self, column: str, rows: int) -> Iterator[NDArray[Any]]:
        if self.path.suffix == ".parquet":
            pa = _pyarrow()
            with pa.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=rows, columns=[column]):
                    array = batch.column(0)
                    yield array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
            return
        if self.path.suffix == ".npz":
            with np.load(self.path, allow_pickle=False) as arrays:
                whole = arrays[column]
        else:
            whole = np.load(self.path if column == "feature" else _projections(self.path), mmap_mode="r", allow_pickle=False)
        for first in range(0, len(whole), rows):
            yield whole[first : first + rows]
