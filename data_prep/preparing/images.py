"""One encoded image file to what is kept of it: decoded once, checked, reduced, encoded.

What comes out is 8 bits, RGB, upright, and plain: the first frame of an animation; transparent
parts over white; 16-bit gray scaled by 255/65535; CMYK by Pillow's formula; color profiles left
out, as in torchvision. A color JPEG that fits may keep its bytes, a gray one too.

Pillow reads the headers and all but JPEG. JPEGs are decoded by libjpeg-turbo itself, which counts
damage within the data as an error; Pillow passes over it without a word.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin, UnidentifiedImageError, features

from data_prep.beton import JPG, PAGE_BYTES, RAW
from data_prep.datasets import Storage

Pixels = npt.NDArray[np.uint8]

#: Larger images are refused before they are decoded.
MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535

#: Pillow's names of what is read.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: libjpeg-turbo's warning of bytes between the image and the marker of its end. Padding, as some
#: encoders write it, is harmless; but a damaged scan that ends early leaves its rest there too.
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_END_MARKER = b"\xff\xd9"
_PADDING = b"\x00\xff"

#: Deviation in pixels of the Gaussian that smooths for a reduction to 1 / sqrt(2). Measured: of
#: 0.30 to 0.52, the closest to Lanczos' filter over reductions from 0.9 to 0.5.
_SMOOTHING = 0.45

_TJPF_RGB, _TJPF_CMYK = 0, 11


class BadImage(Exception):
    """A file that is no usable image; its text is the reason, for people."""


class Stored(NamedTuple):
    """An image as it is kept.

    Attributes:
        data: uint8 (N,): a JPEG, or the pixels row by row, red, green, blue.
        height: in pixels.
        width: in pixels.
        mode: ``beton.JPG`` or ``beton.RAW``.
        pixels: uint8 (H, W, 3), what was encoded, or what the bytes that were kept decode to.
    """

    data: Pixels
    height: int
    width: int
    mode: int
    pixels: Pixels


def clean(data: bytes, storage: Storage, index: int) -> Stored:
    """Decode, check, reduce and encode one file.

    Args:
        data: content of the file.
        storage: how images are kept.
        index: of the image in its split; decides what is raw in the mixed format.

    Raises:
        BadImage: with the reason, when the file is no usable image.
    """
    image, pixels, is_clean = _decoded(data)
    reduced = reduce(pixels, storage.side)
    height, width = reduced.shape[:2]
    raw = storage.format == "raw" or (storage.format == "mixed" and index % 2 == 1)
    if raw:
        stored = reduced.reshape(-1)
    elif reduced is pixels and is_clean and _keeps_bytes(data, image, pixels, storage):
        stored = np.frombuffer(data, dtype=np.uint8)
    else:
        stored = _jpeg(reduced, storage.quality)
    if len(stored) > PAGE_BYTES:
        raise BadImage(
            f"takes {len(stored):,} bytes as it is to be kept, more than {PAGE_BYTES:,}: lower "
            "data.side"
        )
    return Stored(stored, height, width, RAW if raw else JPG, reduced)


def seen(data: bytes, storage: Storage | None) -> Pixels:
    """What a reader of prepared files would give of a file, uint8 (H, W, 3).

    Where images are kept as JPEGs, that is with the losses of their encoding, as in ``clean``. In
    the mixed format, it is as in the raw one.

    Args:
        data: content of the file.
        storage: how images are kept; None: pixel by pixel, as large as they are.

    Raises:
        BadImage: with the reason, when the file is no usable image.
    """
    image, pixels, is_clean = _decoded(data)
    if storage is None:
        return pixels
    reduced = reduce(pixels, storage.side)
    unchanged = reduced is pixels and is_clean and _keeps_bytes(data, image, pixels, storage)
    if storage.format != "jpg" or unchanged:
        return reduced
    return np.asarray(Image.open(io.BytesIO(_jpeg(reduced, storage.quality).data)))


def decode(data: bytes) -> Pixels:
    """Pixels of a file as Pillow alone decodes them, uint8 (H, W, 3), upright, full size.

    For comparison with what ``clean`` made of the file.

    Raises:
        BadImage: with the reason, when the file is no usable image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _opened(data)
        return _upright(_pillow_pixels(image), _orientation(image))


def reduce(pixels: Pixels, side: int | None) -> Pixels:
    """The image, its longer side reduced to ``side`` pixels where it is longer.

    To less than half, each new pixel is the mean of the area that it covers. To more, the image is
    smoothed and interpolated, which on photographs is as close to Lanczos' filter as the means of
    areas are, at a third of their time.

    Args:
        pixels: uint8 (H, W, 3).
        side: None leaves every image as it is.
    """
    import cv2

    height, width = reduced_size(pixels.shape[0], pixels.shape[1], side)
    if (height, width) == pixels.shape[:2]:
        return pixels
    ratio = max(pixels.shape[:2]) / max(height, width)
    if ratio > 2:
        reduced = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    else:
        deviation = _SMOOTHING * math.sqrt(ratio**2 - 1)
        size = 3 if deviation < 0.5 else 5
        smooth = cv2.GaussianBlur(pixels, (size, size), deviation)
        reduced = cv2.resize(smooth, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(reduced, dtype=np.uint8)


def reduced_size(height: int, width: int, side: int | None) -> tuple[int, int]:
    """Height and width after ``reduce``: rounded, at least 1 pixel."""
    longer = max(height, width)
    if side is None or longer <= side:
        return height, width
    height, width = (max(1, (2 * size * side + longer) // (2 * longer)) for size in (height, width))
    return height, width


def has_strict_decoder() -> bool:
    """Whether damage in the middle of a JPEG is found, for which libjpeg-turbo itself is needed."""
    return _turbo() is not None


def jpeg_decoder() -> str:
    """Which library decodes JPEGs: that of FFCV, the system's, or that within Pillow."""
    turbo = _turbo()
    if turbo is None:
        return f"pillow {features.version('libjpeg_turbo')}"
    if "libffcv" in Path(turbo._name).name:
        return f"ffcv {importlib.metadata.version('ffcv')}"
    return "libturbojpeg"


def decode_jpeg(data: bytes, width: int, height: int, cmyk: bool = False) -> tuple[Pixels, bool]:
    """Decode a JPEG, accepting no damage; also whether it gives no warning at all.

    The one warning that is accepted is of bytes before the end marker that are all 0x00 or 0xFF,
    without which the file decodes as it should.

    Args:
        data: the whole file.
        width: as its header says.
        height: as its header says.
        cmyk: whether it has four components; then so has what is returned.

    Raises:
        BadImage: at any error of libjpeg-turbo, and at any warning but that one.
        RuntimeError: when ``has_strict_decoder()`` is not true.
    """
    pixels, problem = _decompressed(data, width, height, cmyk)
    if not problem:
        return pixels, True
    # Twice: the decoder reads ahead, and does not count what it has read of the padding.
    for _ in range(2):
        data = _without_padding(data, problem)
        pixels, problem = _decompressed(data, width, height, cmyk)
        if not problem:
            return pixels, False
    raise BadImage(f"damaged JPEG: {problem}")


def _decompressed(data: bytes, width: int, height: int, cmyk: bool) -> tuple[Pixels, str]:
    """What libjpeg-turbo decodes, and its first complaint or nothing."""
    turbo = _turbo()
    if turbo is None:
        raise RuntimeError("libjpeg-turbo was not found")
    pixels = np.empty((height, width, 4 if cmyk else 3), dtype=np.uint8)
    form = _TJPF_CMYK if cmyk else _TJPF_RGB
    handle = turbo.tjInitDecompress()
    try:
        failed = turbo.tjDecompress2(
            handle, data, len(data), pixels.ctypes.data, width, 0, height, form, 0
        )
        problem = turbo.tjGetErrorStr2(handle).decode() if failed else ""
    finally:
        turbo.tjDestroy(handle)
    return pixels, problem


def _without_padding(data: bytes, problem: str) -> bytes:
    """The file without the bytes that the decoder warns of, if they are nothing but padding."""
    found = _EXTRANEOUS.search(problem)
    end = data.rfind(_END_MARKER)
    start = end - int(found[1]) if found else -1
    if start < 0 or data[start:end].strip(_PADDING):
        raise BadImage(f"damaged JPEG: {problem}")
    return data[:start] + data[end:]


@functools.cache
def _turbo() -> ctypes.CDLL | None:
    """libjpeg-turbo as FFCV's library brings it along, which is not imported; else the system's."""
    package = importlib.util.find_spec("ffcv")
    folders = [] if package is None else list(package.submodule_search_locations or [])
    names = [str(file) for folder in folders for file in Path(folder).glob("_libffcv*.so")]
    for name in [*names, "libturbojpeg.so.0"]:
        try:
            turbo = ctypes.CDLL(name)
            turbo.tjInitDecompress.restype = ctypes.c_void_p
        except (OSError, AttributeError):
            continue
        turbo.tjDecompress2.argtypes = [
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p),
            *[ctypes.c_int] * 5,
        ]
        turbo.tjGetErrorStr2.argtypes = turbo.tjDestroy.argtypes = [ctypes.c_void_p]
        turbo.tjGetErrorStr2.restype = ctypes.c_char_p
        return turbo
    return None


def _decoded(data: bytes) -> tuple[Image.Image, Pixels, bool]:
    """The image, its upright pixels, and whether a strict decoder has nothing to say of them."""
    with warnings.catch_warnings():
        # Of Pillow, about what is no error: large images, damaged EXIF blocks.
        warnings.simplefilter("ignore")
        image = _opened(data)
        pixels, is_clean = _pixels(data, image)
        return image, _upright(pixels, _orientation(image)), is_clean


def _keeps_bytes(data: bytes, image: Image.Image, pixels: Pixels, storage: Storage) -> bool:
    """Whether a file that needs no change is kept as it is."""
    # Not megabytes of metadata around a small image.
    return storage.passthrough and len(data) <= pixels.size and _is_plain_jpeg(image)


def _opened(data: bytes) -> Image.Image:
    """The image, its header read; nothing is decoded."""
    if not data:
        raise BadImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage(f"no image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged header provokes in Pillow
        raise BadImage(_reason(error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} are more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{width} x {height}: no side may exceed {MAX_SIDE:,} pixels")
    if min(width, height) < 1:
        raise BadImage(f"{width} x {height}: no pixel")
    return image


def _reason(error: Exception) -> str:
    return f"cannot be decoded: {str(error) or type(error).__name__}".splitlines()[0]


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block says nothing
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation not in _UPRIGHT:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))


def _pixels(data: bytes, image: Image.Image) -> tuple[Pixels, bool]:
    """Pixels of the whole image, and whether a strict decoder has nothing to say of them."""
    if image.format not in ("JPEG", "MPO") or not has_strict_decoder():
        return _pillow_pixels(image), True
    if image.mode == "CMYK":
        _, is_clean = decode_jpeg(data, *image.size, cmyk=True)  # for its check alone
        return _pillow_pixels(image), is_clean
    return decode_jpeg(data, *image.size)


def _pillow_pixels(image: Image.Image) -> Pixels:
    try:
        image.load()
        return np.asarray(_as_rgb(image))
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # whatever damaged data provoke in Pillow
        raise BadImage(_reason(error)) from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_gray(image).convert("RGB")
    if image.has_transparency_data:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, "white")
        return Image.alpha_composite(white, colors).convert("RGB")
    return image.convert("RGB")


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """Gray of 16 bits, scaled to 8; Pillow itself would cut off all above 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        raise BadImage("gray values of 32 bits, whose range is not known")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether the bytes can be kept: upright, not progressive, in colors that FFCV decodes."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.format != "JPEG":
        return False
    if "progressive" in image.info or _orientation(image) in _UPRIGHT:
        return False
    return image.mode == "L" or (
        image.mode == "RGB" and JpegImagePlugin.get_sampling(image) in (0, 1, 2)
    )


def _jpeg(pixels: Pixels, quality: int) -> Pixels:
    import cv2

    parameters = [cv2.IMWRITE_JPEG_QUALITY, quality]
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), parameters)
    if not done:
        raise BadImage("cannot be encoded as JPEG")
    return np.asarray(encoded, dtype=np.uint8).reshape(-1)
