"""Tests of `jpeg_scan` against TurboJPEG: what it accepts decodes without a warning, and it recognises the common kinds."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from fastbyol.data.conversion import encode
from fastbyol.data.conversion.encode import DroppedImage, EncodedImage, Encoder, EncodeSettings
from fastbyol.data.conversion.jpeg_scan import is_whole
from fastbyol.data.formats.jpeg_header import read_jpeg_header
from fastbyol.data.formats.turbojpeg import TurboJpeg


def jpeg(width: int = 40, height: int = 33, *, mode: str = "RGB", seed: int = 0, smooth: bool = False, **options: object) -> bytes:
    rng = np.random.default_rng(seed)
    channels = {"L": (), "RGB": (3,), "CMYK": (4,)}[mode]
    shape = (2, 2) if smooth else (height, width)
    pixels = rng.integers(0, 256, (*shape, *channels), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, mode).resize((width, height)).save(out, "JPEG", **options)
    return out.getvalue()


def complaints(data: bytes) -> list[str]:
    """Returns TurboJPEG's messages from the quick check and from a full decode."""
    header = read_jpeg_header(data)
    if header is None:
        return ["no header"]
    turbo = TurboJpeg()
    out = np.empty((header.height, header.width, 3), dtype=np.uint8)
    said = (turbo.check(data, height=header.height, width=header.width), turbo.decode(data, out))
    return [text or "fatal" for text, fatal in said if text or fatal]


@pytest.mark.parametrize("quality", [5, 60, 90, 100])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("optimize", [False, True])
def test_common_kinds_of_jpeg_are_recognised_as_complete(quality: int, subsampling: str, optimize: bool) -> None:
    for seed, (width, height) in enumerate([(1, 1), (8, 8), (17, 33), (130, 64)]):
        for smooth in (False, True):
            data = jpeg(width, height, seed=seed, smooth=smooth, quality=quality, subsampling=subsampling, optimize=optimize)
            assert not complaints(data)
            assert is_whole(data)


def test_gray_jpegs_and_jpegs_with_metadata_are_recognised_as_complete() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (jpeg(mode="L"), jpeg(comment=b"c" * 300), jpeg(exif=exif), jpeg(icc_profile=b"p" * 70_000)):
        assert is_whole(data)
        assert not complaints(data)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(progressive=True),
        jpeg(restart_marker_blocks=2),
        jpeg(mode="CMYK"),
        jpeg() + b"\0",
        jpeg()[:-2],
        jpeg()[:-40] + b"\xff\xd9",
        jpeg()[:-2] + b"\x12\x34\xff\xd9",
        jpeg()[:-9] + b"\xff\xd0" + jpeg()[-9:],
        jpeg().replace(b"\xff\xc0\0\x11", b"\xff\xc0\0\x10"),
        jpeg()[: jpeg().index(b"\xff\xc0\0\x11") + 18] + jpeg()[jpeg().index(b"\xff\xc0\0\x11") + 19 :],
        jpeg().replace(b"\xff\xc0\0\x11", b"\xff\xc0\0\x10").replace(b"\x03\x11\x01\xff\xc4", b"\x03\x11\xff\xc4"),
        jpeg()[:100],
        jpeg()[:2],
        jpeg()[:20] + b"\0" + jpeg()[20:],
        b"",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
    ],
)
def test_unusual_jpegs_are_left_to_the_decoder(data: bytes) -> None:
    assert not is_whole(data)


def damaged(original: bytes, *, seed: int, count: int) -> Iterator[bytes]:
    """Returns the JPEG with a random damage: a byte changed, removed or inserted, bits flipped, a range removed, or the end cut off."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        data, at = bytearray(original), int(rng.integers(2, len(original)))
        match int(rng.integers(6)):
            case 0:
                data[at] = int(rng.integers(256))
            case 1:
                del data[at]
            case 2:
                data.insert(at, int(rng.integers(256)))
            case 3:
                for place in rng.integers(2, len(data), 2):
                    data[place] ^= 1 << int(rng.integers(8))
            case 4:
                del data[at : at + int(rng.integers(1, 30))]
            case _:
                data[at:] = b"\xff\xd9"
        yield bytes(data)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("optimize", [False, True])
def test_a_jpeg_recognised_as_complete_decodes_without_a_warning(mode: str, subsampling: str, optimize: bool) -> None:
    original = jpeg(72, 50, mode=mode, subsampling=subsampling, optimize=optimize, smooth=optimize)
    whole = [data for data in damaged(original, seed=len(original), count=4_000) if is_whole(data)]
    assert [text for data in whole for text in complaints(data)] == []
    assert 40 < len(whole) < 2_000  # other pixels, say: the damage that no decoder can see


def test_a_long_conversion_has_the_same_result_as_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [jpeg(seed=1), *damaged(jpeg(72, 50), seed=2, count=300), jpeg(progressive=True), jpeg(mode="CMYK"), b""]
    short = [Encoder(EncodeSettings()).encode(data) for data in images]
    monkeypatch.setattr(encode, "_MANY_IMAGES", 0)
    encoder = Encoder(EncodeSettings())
    assert [encoder.encode(data) for data in images] == short
    assert 10 < sum(isinstance(one, EncodedImage) for one in short) < 290


def test_huffman_tables_of_the_previous_image_are_not_reused() -> None:
    """A reused decoder keeps its tables, so the result for a damaged image would depend on the image before."""
    good = jpeg(72, 50)
    begin = good.index(b"\xff\xdb", good.index(b"\xff\xdb") + 2)
    lacking = good[:begin] + good[begin + 69 :]
    assert complaints(good) == []
    assert complaints(lacking) == ["Quantization table 0x01 was not defined"] * 2
    encoder = Encoder(EncodeSettings())
    assert isinstance(encoder.encode(good), EncodedImage)
    assert isinstance(encoder.encode(lacking), DroppedImage)
