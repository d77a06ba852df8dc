from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from data_prep.beton import JPG, RAW
from data_prep.datasets import Storage
from data_prep.preparing import images
from data_prep.preparing.images import (
    BadImage,
    clean,
    decode,
    decode_jpeg,
    has_strict_decoder,
    reduce,
)
from tests.pictures import picture

AS_PIXELS = Storage(format="raw")

needs_strict_decoder = pytest.mark.skipif(not has_strict_decoder(), reason="FFCV is not installed")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    stored = clean(data, AS_PIXELS, 0)
    assert stored.mode == RAW
    return stored.data.reshape(stored.height, stored.width, 3)


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def closeness(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_each_format_gives_the_pixels_that_pillow_shows(kind: str) -> None:
    data = encoded(picture(1, 30, 41), kind)
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels_of(data), shown)
    assert np.array_equal(decode(data), shown)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_turned_photographs_are_turned_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(2, 30, 41), kind, exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(pixels_of(data), shown)
    assert np.array_equal(decode(data), shown)
    stored = clean(data, Storage(), 0)
    assert (stored.height, stored.width) == shown.shape[:2]
    kept = stored.data.tobytes() == data
    assert kept == (kind == "JPEG" and orientation == 1)


def test_gray_becomes_three_equal_channels_and_a_gray_jpeg_keeps_its_bytes() -> None:
    gray = picture(3, 30, 41).convert("L")
    assert np.array_equal(pixels_of(encoded(gray, "PNG")), np.asarray(gray.convert("RGB")))
    data = encoded(gray, "JPEG")
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels_of(data), shown)
    assert clean(data, Storage(), 0).data.tobytes() == data


def test_cmyk_becomes_rgb_as_opencv_shows_it() -> None:
    data = encoded(picture(4, 30, 41).convert("CMYK"), "JPEG", quality=95)
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert distance(pixels_of(data), np.asarray(bgr)[..., ::-1]) <= 2
    stored = clean(data, Storage(), 0)
    assert Image.open(io.BytesIO(stored.data.tobytes())).mode == "RGB"


def test_sixteen_bits_are_scaled_to_eight() -> None:
    ramp = np.linspace(0, 65535, 40 * 50).astype(np.uint16).reshape(40, 50)
    expected = np.rint(ramp / 65535 * 255)
    for extension in (".png", ".tiff"):
        gray = cv2.imencode(extension, ramp)[1].tobytes()
        assert distance(pixels_of(gray), expected[..., np.newaxis]) == 0
        color = cv2.imencode(extension, np.stack([ramp, ramp[::-1], ramp.T.reshape(40, 50)], -1))
        shown = pixels_of(color[1].tobytes())
        assert distance(shown[..., 2], expected) <= 1  # OpenCV writes blue first


def test_gray_of_unknown_range_is_refused() -> None:
    for values in (np.linspace(0, 1, 100, dtype=np.float32), np.arange(100, dtype=np.int32) * 9999):
        data = encoded(Image.fromarray(values.reshape(10, 10)), "TIFF")
        with pytest.raises(BadImage, match="gray values of 32 bits"):
            clean(data, AS_PIXELS, 0)


def test_transparent_parts_are_white() -> None:
    colors = np.zeros((10, 10, 4), np.uint8)
    colors[..., 0] = 200
    colors[:, :5, 3] = 255
    colors[:, 5, 3] = 128
    shown = pixels_of(encoded(Image.fromarray(colors), "PNG"))
    assert (shown[:, :5] == (200, 0, 0)).all() and (shown[:, 6:] == 255).all()
    assert distance(shown[:, 5], np.array([227.5, 127, 127])) <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    shown = pixels_of(encoded(palette, "PNG", transparency=0))
    assert (shown[0, 0] == 255).all() and (shown[1, 1] == (10, 20, 30)).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert distance(pixels_of(data), np.array([255, 0, 0])) <= 2


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size, and a single line of pixels."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image at all", "no image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image in a known format"),
        (png_header(20_000, 20_000), "more than 100,000,000 pixels"),
        (png_header(10_001, 10_000), "10001 x 10000 are more than 100,000,000 pixels"),
        (png_header(65_536, 2), "65536 x 2: no side may exceed 65,535 pixels"),
        (png_header(50, 50), "cannot be decoded"),
        (png_header(0, 50), "cannot be decoded|no image|no pixel"),
    ],
)
def test_what_is_no_usable_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        clean(data, Storage(side=16), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    data = encoded(picture(5, 60, 80), kind)
    with pytest.raises(BadImage):
        clean(data[: int(len(data) * share)], Storage(), 0)


@needs_strict_decoder
def test_damage_in_the_middle_of_a_jpeg_is_found_though_pillow_overlooks_it() -> None:
    data = bytearray(encoded(picture(6, 200, 300), "JPEG"))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    Image.open(io.BytesIO(data)).load()
    for storage in (Storage(), AS_PIXELS):
        with pytest.raises(BadImage, match="damaged JPEG: Corrupt JPEG data"):
            clean(bytes(data), storage, 0)
    cmyk = bytearray(encoded(picture(6, 200, 300).convert("CMYK"), "JPEG"))
    cmyk[len(cmyk) // 2 : len(cmyk) // 2 + 40] = bytes(40)
    with pytest.raises(BadImage, match="damaged JPEG: Corrupt JPEG data"):
        clean(bytes(cmyk), Storage(), 0)


def test_damaged_files_are_cleaned_or_refused_and_nothing_else() -> None:
    generator = random.Random(0)
    kinds = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]
    whole = [encoded(picture(7, 40, 50), kind) for kind in kinds]
    refused = 0
    for _ in range(1500):
        data = bytearray(generator.choice(whole))
        for _ in range(generator.choice((1, 3, 10))):
            data[generator.randrange(min(len(data), 600))] = generator.randrange(256)
        try:
            stored = clean(bytes(data), Storage(side=20), 0)
        except BadImage as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert 1 <= max(stored.height, stored.width) <= 20
    assert refused > 100


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [
        (375, 500, 256, (192, 256)),
        (500, 333, 400, (400, 266)),
        (10, 1000, 100, (1, 100)),
        (1, 1000, 100, (1, 100)),
        (1000, 3, 100, (100, 1)),
        (3, 201, 200, (3, 200)),
        (80, 100, 100, (80, 100)),
        (80, 100, None, (80, 100)),
    ],
)
def test_the_longer_side_is_reduced_and_never_enlarged(
    height: int, width: int, side: int | None, expected: tuple[int, int]
) -> None:
    assert reduce(np.zeros((height, width, 3), np.uint8), side).shape == (*expected, 3)


@pytest.mark.parametrize("side", [460, 400, 320, 256, 200, 100, 50])
def test_reducing_comes_close_to_lanczos_filter(side: int) -> None:
    pixels = np.asarray(picture(8, 375, 500))
    rough = np.random.RandomState(0).randint(0, 256, (375, 500, 3)).astype(np.uint8)
    for image, floor in ((pixels, 36), (rough, 18)):
        reduced = reduce(image, side)
        size = (reduced.shape[1], reduced.shape[0])
        reference = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        assert closeness(reduced, reference) > floor


def test_every_second_image_of_the_mixed_format_is_raw() -> None:
    data = encoded(picture(9, 30, 41), "JPEG")
    mixed = [clean(data, Storage(format="mixed"), index) for index in range(4)]
    assert [stored.mode for stored in mixed] == [JPG, RAW, JPG, RAW]
    assert len(mixed[1].data) == 30 * 41 * 3


@pytest.mark.parametrize("quality", [60, 90])
def test_jpegs_are_encoded_at_the_quality_that_is_asked_for(quality: int) -> None:
    image = picture(10, 60, 80)
    stored = clean(encoded(image, "PNG"), Storage(quality=quality), 0)
    tables = []
    for jpeg in (stored.data.tobytes(), encoded(image, "JPEG", quality=quality)):
        opened = Image.open(io.BytesIO(jpeg))
        assert isinstance(opened, JpegImageFile)
        tables.append(opened.quantization)
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("options", "storage", "kept"),
    [
        ({}, Storage(side=80), True),
        ({}, Storage(side=79), False),
        ({}, Storage(passthrough=False), False),
        ({"progressive": True}, Storage(), False),
        ({"subsampling": "4:4:4"}, Storage(), True),
        ({"subsampling": "4:2:2"}, Storage(), True),
        ({"comment": b"kept"}, Storage(), True),
    ],
)
def test_a_plain_jpeg_that_fits_keeps_its_bytes(
    options: dict[str, object], storage: Storage, kept: bool
) -> None:
    data = encoded(picture(11, 60, 80), "JPEG", **options)
    stored = clean(data, storage, 0)
    assert (stored.data.tobytes() == data) == kept
    assert stored.mode == JPG


def test_an_image_that_no_page_can_hold_is_refused() -> None:
    data = encoded(Image.new("RGB", (2000, 1500)), "PNG")
    with pytest.raises(BadImage, match=r"takes 9,000,000 bytes .* lower data\.side"):
        clean(data, AS_PIXELS, 0)
    assert clean(data, Storage(), 0).mode == JPG


@needs_strict_decoder
def test_without_the_strict_decoder_pillow_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    makers: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: image,
        lambda image: image.convert("L"),
    ]
    files = [encoded(make(picture(12, 61, 83)), "JPEG") for make in makers]
    strict = [clean(data, Storage(side=50), 0).data.tobytes() for data in files]
    monkeypatch.setattr(images, "_turbo", lambda: None)
    assert not has_strict_decoder()
    assert [clean(data, Storage(side=50), 0).data.tobytes() for data in files] == strict
    with pytest.raises(RuntimeError):
        decode_jpeg(files[0], 83, 61)


PADDINGS = [bytes(count) for count in (1, 7, 8, 40, 300)] + [b"\xff" * 9, b"\x00\xff" * 9]


@needs_strict_decoder
@pytest.mark.parametrize("kind", ["plain", "optimize", "progressive"])
def test_padding_before_the_end_of_a_jpeg_is_no_damage(kind: str) -> None:
    """As in some files of ImageNet, whose validation split has to stay whole."""
    warned = 0
    for seed in range(12):
        width, height = 30 + 3 * seed, 25 + 2 * seed
        good = encoded(picture(seed, height, width), "JPEG", **{kind: True})
        for padding in PADDINGS:
            padded = good[:-2] + padding + good[-2:]
            pixels, is_clean = decode_jpeg(padded, width, height)
            assert np.array_equal(pixels, decode_jpeg(good, width, height)[0])
            if not is_clean:
                warned += 1
                stored = clean(padded, Storage(passthrough=True), 0).data.tobytes()
                assert stored not in (padded, good) and decode_jpeg(stored, width, height)[1]
    assert warned > 12


@needs_strict_decoder
@pytest.mark.parametrize("kind", ["plain", "optimize", "progressive"])
def test_no_flipped_bit_that_the_decoder_warns_of_is_taken_for_padding(kind: str) -> None:
    generator = random.Random(0)
    ends_early = 0
    for seed in range(8):
        good = encoded(picture(seed, 90 + seed, 70 + seed), "JPEG", **{kind: True})
        scan = good.index(b"\xff\xda") + 14
        for _ in range(150):
            data = bytearray(good)
            data[generator.randrange(scan, len(good) - 2)] ^= 1 << generator.randrange(8)
            _, problem = images._decompressed(bytes(data), 70 + seed, 90 + seed, cmyk=False)
            ends_early += "extraneous bytes before marker 0xd9" in problem
            if problem:
                with pytest.raises(BadImage, match="damaged JPEG"):
                    clean(bytes(data), Storage(), 0)
    assert ends_early > 20


@needs_strict_decoder
def test_a_jpeg_cut_before_its_end_marker_is_damaged() -> None:
    good = encoded(picture(13, 40, 56), "JPEG")
    for padding in (b"", bytes(40)):
        with pytest.raises(BadImage, match="damaged JPEG"):
            clean(good[: len(good) * 9 // 10] + padding + good[-2:], Storage(), 0)


def test_a_jpeg_with_more_metadata_than_pixels_is_encoded_again() -> None:
    image = picture(14, 60, 80)
    block = b"\xff\xe9" + struct.pack(">H", 65_535) + bytes(65_533)
    small, large = (encoded(image, "JPEG", extra=extra) for extra in (b"", block))
    assert clean(small, Storage(), 0).data.tobytes() == small
    stored = clean(large, Storage(), 0).data.tobytes()
    assert len(stored) < 60 * 80 * 3 < len(large)
    assert closeness(pixels_of(stored), pixels_of(large)) > 35
