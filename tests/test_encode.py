"""Tests of the encoder: the outcome for every kind of image, the same for both output formats."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from fastbyol.config.errors import UserError
from fastbyol.data.conversion import encode
from fastbyol.data.conversion.encode import DroppedImage, EncodedImage, Encoder, EncodeSettings, Outcome
from fastbyol.data.formats.beton import JPEG_MODE, RAW_MODE
from fastbyol.data.formats.jpeg_header import read_jpeg_header
from fastbyol.data.formats.pillow_decoding import decode_with_pillow
from fastbyol.data.formats.turbojpeg import TurboJpeg


def photo(height: int = 48, width: int = 64) -> Image.Image:
    """Returns a smooth, colourful image whose quarters differ, so that its rotations and mirror images are distinguishable."""
    coarse = np.random.default_rng(7).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]) :]


def encoded(data: bytes, *, index: int = 0, **settings: object) -> EncodedImage:
    result = Encoder(EncodeSettings(**settings)).encode(data, index=index)  # type: ignore[arg-type]
    assert isinstance(result, EncodedImage), result
    assert result.crc32 == zlib.crc32(result.data)
    return result


def dropped(data: bytes, **settings: object) -> DroppedImage:
    result = Encoder(EncodeSettings(**settings)).encode(data)  # type: ignore[arg-type]
    assert isinstance(result, DroppedImage), result
    assert result.detail
    return result


def pixels(image: EncodedImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB")).astype(int)


def distance(image: EncodedImage, wanted: Image.Image) -> float:
    return float(np.abs(pixels(image) - np.asarray(wanted.convert("RGB"))).mean())


@pytest.fixture(params=["TurboJPEG", "Pillow"])
def either_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test with libffcv's TurboJPEG, and without it, as if ffcv were not installed."""
    if request.param == "Pillow":
        monkeypatch.setattr(encode, "find_turbojpeg", lambda: None)
    return request.param


PLAIN = {
    "baseline": saved(photo()),
    "progressive": saved(photo(), progressive=True),
    "gray": saved(photo().convert("L")),
    "one pixel": saved(photo(1, 1)),
    "very long": saved(photo(3, 4000)),
    "followed by junk": saved(photo()) + b"junk" * 100,
    "followed by another picture": saved(photo()) * 2,
    "with a preview": saved(photo(), comment=saved(photo(8, 8))),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_jpeg_passes_byte_for_byte(name: str, either_decoder: str) -> None:
    image = encoded(PLAIN[name])
    assert (image.data, image.outcome, image.reason, image.notes) == (PLAIN[name], Outcome.PASSED, "", ())
    with Image.open(io.BytesIO(PLAIN[name])) as opened:
        assert (image.width, image.height) == opened.size


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


ODD = {
    "PNG": (saved(photo(), "PNG"), photo()),
    "PNG gray": (saved(photo().convert("L"), "PNG"), photo().convert("L")),
    "PNG with alpha": (saved(photo().convert("RGBA"), "PNG"), photo()),
    "PNG palette": (saved(photo().quantize(200), "PNG"), photo().quantize(200)),
    "PNG 16-bit": (saved(sixteen_bits(photo()), "PNG"), photo().convert("L")),
    "PPM 16-bit": (b"P5 64 48 65535\n" + np.asarray(sixteen_bits(photo())).astype(">u2").tobytes(), photo().convert("L")),
    "WEBP": (saved(photo(), "WEBP", lossless=True), photo()),
    "BMP": (saved(photo(), "BMP"), photo()),
    "TIFF": (saved(photo(), "TIFF"), photo()),
    "GIF palette": (saved(photo().quantize(200), "GIF"), photo().quantize(200)),
    "CMYK JPEG": (saved(photo().convert("CMYK"), quality=95), photo()),
}


@pytest.mark.parametrize("name", ODD)
def test_formats_that_not_every_decoder_reads_become_an_rgb_jpeg_of_the_same_picture(name: str, either_decoder: str) -> None:
    data, wanted = ODD[name]
    image = encoded(data)
    assert (image.outcome, image.reason) == (Outcome.TRANSCODED, name)
    assert distance(image, wanted) < 4
    assert (image.height, image.width) == (48, 64)


def ycck_jpeg(ink: np.ndarray) -> bytes:
    """Returns a YCCK JPEG as Adobe writes it: YCC of the inks, black inverted. Made by Pillow's encoder, which inverts all planes; relabelled."""
    ycc = np.asarray(Image.fromarray(ink[..., :3]).convert("YCbCr"))
    stored = np.dstack([ycc, 255 - ink[..., 3]])
    data = bytearray(saved(Image.fromarray(255 - stored, "CMYK"), quality=98, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def test_cmyk_and_ycck_are_inverted_only_with_adobes_marker() -> None:
    # By the printers' rule, (255 - ink) (255 - black) / 255, of inks that are stored inverted where Adobe's marker stands.
    ink = np.dstack([np.asarray(photo()), np.full((48, 64), 60, dtype=np.uint8)])
    wanted = Image.fromarray(((255 - ink[..., :3].astype(int)) * (255 - 60) // 255).astype(np.uint8))
    adobe = saved(Image.fromarray(ink, "CMYK"), quality=98, subsampling=0)
    assert read_jpeg_header(adobe).adobe_transform == 0  # type: ignore[union-attr]
    assert distance(encoded(adobe), wanted) < 3
    ycck = encoded(ycck_jpeg(ink))
    assert ycck.reason == "YCCK JPEG"
    assert distance(ycck, wanted) < 4
    plain = without_adobe_marker(saved(Image.fromarray(255 - ink, "CMYK"), quality=98, subsampling=0))
    assert read_jpeg_header(plain).adobe_transform is None  # type: ignore[union-attr]
    assert distance(encoded(plain), wanted) < 3


BAD = {
    "empty": b"",
    "truncated in the middle": PLAIN["baseline"][: len(PLAIN["baseline"]) // 2],
    "truncated progressive": PLAIN["progressive"][: len(PLAIN["progressive"]) // 2],
    "truncated by two bytes": PLAIN["baseline"][:-2],
    "truncated PNG": ODD["PNG"][0][:600],
    "not an image: HTML": b"<html><body>404</body></html>",
    "not an image: noise": np.random.default_rng(1).bytes(4000),
    "not an image: PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "truncated in its header": PLAIN["baseline"][:200],
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_not_images_are_dropped_with_a_reason(name: str, either_decoder: str) -> None:
    reason = dropped(BAD[name]).reason
    assert name.startswith(reason)


def test_a_truncated_jpeg_with_a_proper_end_marker_is_dropped_although_libjpeg_only_warns() -> None:
    whole = saved(photo(96, 128), quality=95)
    cut = whole[: len(whole) * 4 // 5] + b"\xff\xd9"
    with Image.open(io.BytesIO(cut)) as image:
        image.load()  # Pillow fills the rest with gray and says nothing
    assert dropped(cut).reason == "truncated"


def test_a_jpeg_with_stray_bytes_is_kept_as_it_is_and_noted() -> None:
    stray = PLAIN["baseline"][:-2] + bytes(range(1, 41)) + PLAIN["baseline"][-2:]
    image = encoded(stray)
    assert (image.data, image.outcome) == (stray, Outcome.PASSED)
    ((what, detail),) = image.notes
    assert (what, "extraneous bytes before marker 0xd9" in detail) == ("decoder warned", True)


def test_the_quick_check_reports_everything_that_a_full_decode_reports() -> None:
    turbo, random = TurboJpeg(), np.random.default_rng(3)
    out = np.empty((48, 64, 3), dtype=np.uint8)
    complaints = 0
    for jpeg in (PLAIN["baseline"], PLAIN["progressive"], saved(photo(), subsampling=0)):
        for _ in range(150):
            damaged = bytearray(jpeg)
            damaged[int(random.integers(180, len(jpeg)))] ^= 1 << int(random.integers(8))
            full = turbo.decode(bytes(damaged), out)
            assert turbo.check(bytes(damaged), height=48, width=64) == full
            complaints += full != ("", False)
    assert complaints > 50


def test_a_fatal_error_after_a_warning_is_fatal_although_the_library_calls_it_a_warning() -> None:
    assert TurboJpeg().check(PLAIN["baseline"][:200], height=48, width=64)[1]


def png_of(size: int) -> bytes:
    """Returns a PNG whose header says size x size pixels, without any."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_dropped_by_its_header() -> None:
    claim = bytearray(PLAIN["baseline"])
    at = claim.index(b"\xff\xc0")
    claim[at + 5 : at + 9] = struct.pack(">HH", 65000, 65000)
    assert dropped(bytes(claim)).reason == dropped(png_of(30_000)).reason == "too many pixels"
    assert dropped(PLAIN["baseline"], max_pixels=48 * 64 - 1).reason == "too many pixels"
    assert encoded(PLAIN["baseline"], max_pixels=48 * 64).outcome == Outcome.PASSED


def test_an_image_too_long_for_a_jpeg_is_dropped_or_resized() -> None:
    long = saved(Image.new("RGB", (65_501, 1), (10, 200, 30)), "PNG")
    assert dropped(long).reason == "too large"
    assert encoded(long, max_side_px=100).width == 100


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_noted_and_ignored_or_applied_on_request(orientation: int) -> None:
    data = saved(photo(), exif=exif(orientation))
    ignored = encoded(data)
    assert (ignored.data, ignored.notes) == (data, (("EXIF orientation ignored", str(orientation)),))
    # By the standard: what the 0th row and the 0th column of the stored pixels show, top-left first.
    upright = np.asarray(photo())
    turned = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright[::-1].transpose(1, 0, 2),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    applied = encoded(data, exif="apply")
    assert applied.reason == "EXIF orientation applied"
    assert distance(applied, Image.fromarray(turned)) < 3
    assert encoded(PLAIN["baseline"], exif="apply").outcome == Outcome.PASSED


def test_a_tiff_that_pillow_already_rotates_is_not_rotated_twice() -> None:
    image = encoded(saved(photo(), "TIFF", exif=exif(6)), exif="apply")
    assert (image.height, image.width) == (64, 48)
    assert distance(image, photo().transpose(Image.Transpose.ROTATE_270)) < 3


def test_an_icc_profile_is_ignored_and_counted() -> None:
    data = saved(photo(), icc_profile=b"profile" * 10)
    assert (encoded(data).data, encoded(data).has_icc, encoded(PLAIN["baseline"]).has_icc) == (data, True, False)
    assert encoded(saved(photo(), "PNG", icc_profile=b"profile" * 10)).has_icc


def test_large_images_are_shrunk_to_the_maximum_side_with_antialiasing_and_small_ones_are_not_changed() -> None:
    fine = (np.indices((400, 600)).sum(axis=0) % 2 * 255).astype(np.uint8)  # a checkerboard of single pixels: gray if antialiased
    image = encoded(saved(Image.fromarray(fine), quality=95), max_side_px=200)
    assert (image.height, image.width, image.outcome) == (133, 200, Outcome.RESIZED)
    assert np.abs(pixels(image) - 127).max() <= 4
    assert encoded(PLAIN["baseline"], max_side_px=64).data == PLAIN["baseline"]


def test_quality_applies_only_to_transcoded_and_resized_images() -> None:
    data, _ = ODD["PNG"]
    assert len(encoded(data, quality=50).data) < len(encoded(data).data)
    assert encoded(PLAIN["baseline"], quality=50).data == PLAIN["baseline"]
    assert len(encoded(PLAIN["baseline"], quality=50, max_side_px=40).data) < len(encoded(PLAIN["baseline"], max_side_px=40).data)


def test_raw_images_are_the_decoded_pixels_and_a_fraction_chooses_the_same_ones_each_time() -> None:
    image = encoded(PLAIN["baseline"], raw_fraction=1.0)
    with Image.open(io.BytesIO(PLAIN["baseline"])) as opened:
        assert (image.data, image.mode, image.outcome) == (opened.convert("RGB").tobytes(), RAW_MODE, Outcome.RAW)
    tiny = saved(photo(8, 8))
    picks = [[encoded(tiny, raw_fraction=0.3, index=i).mode for i in range(1000)] for _ in range(2)]
    assert picks[0] == picks[1]
    assert 250 < picks[0].count(RAW_MODE) < 350  # 300, standard deviation 14.5


def test_an_image_too_large_for_its_output_is_kept_as_jpeg_instead_of_raw_or_dropped() -> None:
    assert encoded(PLAIN["baseline"], raw_fraction=1.0, max_stored_bytes=3 * 48 * 64 - 1).mode == JPEG_MODE
    assert dropped(PLAIN["baseline"], max_stored_bytes=len(PLAIN["baseline"]) - 1).reason == "too large"


RAMP = np.linspace(0, 1, 40 * 48).reshape(40, 48)
"""From black to white."""


@pytest.mark.parametrize(
    ("values", "kind", "guessed"),
    [
        ((255 * RAMP).astype(np.int32), "TIFF of integers", "0 to 255"),
        ((4095 * RAMP).astype(np.int32), "TIFF of integers", "0 to 4095"),
        ((65535 * RAMP).astype(np.int32), "TIFF of integers", ""),
        ((-1024 + 4096 * RAMP).astype(np.int32), "TIFF of integers", "-1024 to 3072"),
        ((70_000 + 10**6 * RAMP).astype(np.int32), "TIFF of integers", "70000 to 1.07e+06"),
        ((4095 * RAMP).astype(np.uint16), "TIFF 16-bit", "0 to 4095"),
        ((255 * RAMP).astype(np.uint16), "TIFF 16-bit", "0 to 255"),
        ((65535 * RAMP).astype(np.uint16), "TIFF 16-bit", ""),
        (RAMP.astype(np.float32), "TIFF of floats", "0 to 1"),
        ((255 * RAMP).astype(np.float32), "TIFF of floats", "0 to 255"),
        ((-3 + 6 * RAMP).astype(np.float32), "TIFF of floats", "-3 to 3"),
    ],
)
def test_wide_integers_and_floats_are_scaled_to_8_bits_and_never_come_out_black(values: np.ndarray, kind: str, guessed: str) -> None:
    image = encoded(saved(Image.fromarray(values), "TIFF"))
    assert (image.reason, image.notes) == (kind, (("range of its pixel values guessed", guessed),) if guessed else ())
    assert np.abs(pixels(image)[:, :, 1] - 255 * RAMP).max() <= 6


def test_a_value_range_stated_in_a_tiff_is_used() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[340], tags[341] = -10.0, 10.0
    dark = (-10 + 2 * RAMP).astype(np.float32)
    image = encoded(saved(Image.fromarray(dark), "TIFF", tiffinfo=tags))
    assert image.notes == ()
    assert pixels(image).max() < 32


def test_nan_pixels_become_black_and_an_image_of_only_nan_is_dropped() -> None:
    values = RAMP.astype(np.float32)
    values[:20] = np.nan
    assert pixels(encoded(saved(Image.fromarray(values), "TIFF")))[:18].max() < 12
    assert dropped(saved(Image.fromarray(np.full((4, 4), np.inf, dtype=np.float32)), "TIFF")).detail == "no pixel is a number"


def png_with(kind: bytes, content: bytes, *, checksum: int | None = None) -> bytes:
    """Returns a PNG with another chunk in front of its pixels."""
    png = saved(photo(), "PNG")
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return png[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum) + png[33:]


def jpeg_with(marker: int, content: bytes) -> bytes:
    jpeg = saved(photo(), quality=95)
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


METADATA = {
    "EXIF that is no TIFF": png_with(b"eXIf", b"\0\0\x11\0\0\x01\x04\0rubbish"),
    "EXIF as hexadecimal text that is none": png_with(b"tEXt", b"Raw profile type exif\0\nexif\n 10\nzz not hex"),
    "text of 3 MB": png_with(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000)),
    "a colour profile of 3 MB": png_with(b"iCCP", b"p\0\0" + zlib.compress(bytes(3_000_000))),
    "a colour profile that is not compressed": png_with(b"iCCP", b"p\0\0nothing"),
    "a chunk of private rubbish with a wrong checksum": png_with(b"prVt", b"abc", checksum=5),
    "a physical size cut short": png_with(b"pHYs", b"\0\0"),
    "a JPEG's Photoshop segment cut short": jpeg_with(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0"),
    "a JPEG's colour profile cut short": jpeg_with(0xE2, b"ICC_PROFILE\0"),
    "a JPEG's EXIF of rubbish": jpeg_with(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "a JPEG's JFIF header cut short": jpeg_with(0xE0, b"JFIF\0\1"),
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("turbo", [True, False], ids=["TurboJPEG", "Pillow"])
def test_damaged_metadata_never_drops_an_image(turbo: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not turbo:
        monkeypatch.setattr(encode, "find_turbojpeg", lambda: None)
    image = encoded(METADATA[name])
    assert np.abs(decode_with_pillow(image.data).astype(int) - np.asarray(photo()).astype(int)).mean() < 4
    assert np.abs(decode_with_pillow(METADATA[name]).astype(int) - np.asarray(photo()).astype(int)).mean() < 4


def test_a_gif_comment_too_long_for_a_jpeg_is_removed() -> None:
    assert encoded(saved(photo(), "GIF", comment=b"x" * 70_000)).reason == "GIF palette"


@pytest.mark.parametrize("cut", [b"\xff\xd8\xff\xee\0\x0eAdobe\0d", b"\xff\xd8\xff\xc0\0\x11\x08\0"])
def test_a_jpeg_cut_inside_a_segment_is_dropped(cut: bytes) -> None:
    assert read_jpeg_header(cut) is None
    assert dropped(cut).reason in ("truncated", "not an image", "does not decode")


def test_an_image_larger_than_training_decodes_is_dropped_unless_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as in a worker
    huge = saved(Image.new("L", (16_000, 12_000)))
    result = dropped(huge, max_pixels=10**9)
    assert (result.reason, "--max-side makes it smaller" in result.detail) == ("too many pixels", True)
    assert encoded(huge, max_pixels=10**9, max_side_px=100).width == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_side_px": 0}, "max-side = 0"),
        ({"quality": 101}, "quality = 101"),
        ({"exif": "turn"}, "exif = 'turn': must be one of ignore, apply"),
        ({"max_pixels": 0}, "max-pixels = 0"),
        ({"raw_fraction": 1.5}, "raw-fraction = 1.5"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EncodeSettings(**settings)  # type: ignore[arg-type]


def test_the_jpeg_header_is_found_after_fill_bytes_and_previews_and_only_in_jpegs() -> None:
    header = read_jpeg_header(PLAIN["with a preview"])
    assert header is not None
    assert (header.height, header.width, header.components, header.bits, header.is_common) == (48, 64, 3, 8, True)
    filled = PLAIN["baseline"][:2] + b"\xff\xff" + PLAIN["baseline"][2:]
    assert read_jpeg_header(filled) == read_jpeg_header(PLAIN["baseline"])
    assert read_jpeg_header(PLAIN["baseline"][:100]) is None
    assert read_jpeg_header(ODD["PNG"][0]) is None


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_gray_ramps_of_more_than_8_bits_keep_their_order_and_span(kind: str, white: int) -> None:
    ramp = np.linspace(0, white, 256).round().astype(np.uint16)
    pixels = decode_with_pillow(saved(Image.fromarray(np.tile(ramp, (4, 1))), kind))
    assert pixels.shape == (4, 256, 3)
    levels = pixels[0, :, 0].astype(int)
    assert (levels[0], levels[-1]) == (0, 255)
    assert np.abs(levels - np.arange(256)).max() <= 1
    assert (np.diff(levels) >= 0).all()
    assert (pixels == pixels[:1, :, :1]).all()


def test_a_transparent_palette_entry_has_its_own_colour() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([200, 10, 20, 30, 40, 250])
    image.putpixel((3, 1), 1)
    for kind in ("PNG", "GIF"):
        pixels = decode_with_pillow(saved(image, kind, transparency=0))
        assert pixels[0, 0].tolist() == [200, 10, 20]
        assert pixels[1, 3].tolist() == [30, 40, 250]


def test_the_first_picture_of_an_mpo_and_of_an_animation_is_taken() -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((250, 10, 10), (10, 10, 250)))
    for kind in ("MPO", "GIF", "WEBP"):
        pixels = decode_with_pillow(saved(first, kind, save_all=True, append_images=[second]))
        assert np.abs(pixels.astype(int) - [250, 10, 10]).max() <= 6, kind
