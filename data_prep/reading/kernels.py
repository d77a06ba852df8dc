"""Compiled code of the loaders: stored bytes to pixels, many images at a time, without the GIL.

The decoder and the resampler are the native ones that FFCV is built on (libjpeg-turbo and
OpenCV's area filter, both in its extension library). They are called here and not through FFCV's
own operations because those ignore what the decoder returns: a damaged JPEG leaves the previous
image in the buffer, under the wrong label.

Compiled functions are kept on disk by numba, so only the first process on a machine waits for the
compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from numba import types

from data_prep.beton import JPG
from data_prep.datasets import DataError

#: What ``decode`` says of an image: all is well, the file does not give its bytes, they are not
#: those that were written, they are no image.
GOOD, UNREADABLE, DAMAGED, NO_IMAGE = 0, 1, 2, 3

_RGB = 0  # TJPF_RGB
_ACCURATE = 4096  # TJFLAG_ACCURATEDCT: as Pillow and torchvision decode


_config: Any = numba.config
if _config.DISABLE_JIT:
    raise DataError("numba's compiler is off: unset NUMBA_DISABLE_JIT, or set data.backend=torch")


def _native_library() -> ctypes.CDLL:
    package = importlib.util.find_spec("ffcv")
    folders = [] if package is None else list(package.submodule_search_locations or [])
    for folder in folders:
        for path in Path(folder).glob("_libffcv*.so"):
            return ctypes.CDLL(str(path))
    raise DataError("FFCV is not installed: set data.backend=torch")


def _external(name: str, library: ctypes.CDLL, symbol: str, signature: Any) -> Any:
    """A native function that compiled code, also from numba's cache, finds by name."""
    address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(name, address)
    return types.ExternalFunction(name, signature)


def _compiled(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder for the cache can be written
        return numba.njit(function, **options)


_LIBRARY = _native_library()
_LIBRARY.tjInitDecompress.restype = ctypes.c_void_p

_decompress = _external(
    "ternforge_decompress",
    _LIBRARY,
    "tjDecompress2",
    types.int32(
        types.uintp,  # handle
        types.uintp,  # compressed bytes
        types.uintp,  # their number
        types.uintp,  # pixels
        types.int32,  # width
        types.int32,  # bytes in a row of pixels, 0: as many as needed
        types.int32,  # height
        types.int32,  # pixel format
        types.int32,  # flags
    ),
)
_resize = _external("ternforge_resize", _LIBRARY, "resize", types.void(*(types.int64,) * 11))
# Not a memory map: where a mapped page cannot be read, the process dies.
_read = _external(
    "ternforge_read",
    ctypes.CDLL(None),
    "pread",
    types.int64(types.int32, types.uintp, types.uint64, types.int64),
)

_threads = threading.local()


def decompressor() -> int:
    """Handle of this thread's JPEG decoder."""
    if not hasattr(_threads, "handle"):
        _threads.handle = _LIBRARY.tjInitDecompress()
    return _threads.handle


@_compiled
def _checksum(data: npt.NDArray[np.uint8], keys: npt.NDArray[np.uint32]) -> np.uint64:
    """As ``data_prep.beton.checksum``; ``keys`` are at least a quarter of the bytes and two."""
    low = np.uint64(0xFFFFFFFF)
    whole = len(data) // 8
    words = data[: whole * 8].view(np.uint32)
    total = np.uint64(0)
    for place in range(0, 2 * whole, 2):
        first = (np.uint64(words[place]) + np.uint64(keys[place])) & low
        second = (np.uint64(words[place + 1]) + np.uint64(keys[place + 1])) & low
        total += first * second
    if whole * 8 < len(data):
        last = np.uint64(0)
        for place in range(whole * 8, len(data)):
            last |= np.uint64(data[place]) << np.uint64(8 * (place - whole * 8))
        first = ((last & low) + np.uint64(keys[2 * whole])) & low
        second = ((last >> np.uint64(32)) + np.uint64(keys[2 * whole + 1])) & low
        total += first * second
    return total ^ np.uint64(len(data))


@_compiled
def _shifted(
    source: npt.NDArray[np.uint8],
    top: int,
    left: int,
    down: int,
    right: int,
    mirrored: bool,
    edge: bool,
    target: npt.NDArray[np.uint8],
) -> None:
    """Copy the window of ``source`` at (top, left), mirrored first, then moved.

    What moves in is black, or repeats the border pixel.
    """
    height, width, channels = target.shape
    # Of each row, the columns from begin to below end are inside of the image.
    begin, end = min(max(-right, 0), width), max(min(width - right, width), 0)
    first = left + (width - 1 - right if mirrored else right)
    step = -1 if mirrored else 1
    for y in range(height):
        inside = 0 <= y + down < height
        if not inside and not edge:
            target[y] = 0
            continue
        row = top + min(max(y + down, 0), height - 1)
        for x in range(begin, end):
            for channel in range(channels):
                target[y, x, channel] = source[row, first + step * x, channel]
        nearest = left + (width - 1 if mirrored else 0)
        for x in range(min(begin, width)):
            for channel in range(channels):
                target[y, x, channel] = source[row, nearest, channel] if edge else 0
        nearest = left + (0 if mirrored else width - 1)
        for x in range(end, width):
            for channel in range(channels):
                target[y, x, channel] = source[row, nearest, channel] if edge else 0


@_compiled
def _cut(
    source: npt.NDArray[np.uint8],
    window: npt.NDArray[np.int32],
    move: npt.NDArray[np.int32],
    edge: bool,
    resized: npt.NDArray[np.uint8],
    image: npt.NDArray[np.uint8],
) -> None:
    """Resize a window of ``source`` to ``image``, mirrored and moved; see ``decode``."""
    height, width = image.shape[:2]
    top, left = np.int64(window[0]), np.int64(window[1])
    tall, wide = np.int64(window[2]), np.int64(window[3])
    down, right, mirrored = np.int64(move[0]), np.int64(move[1]), move[2] != 0
    moved = mirrored or down != 0 or right != 0
    if tall != height or wide != width:
        target = resized if moved else image
        _resize(
            0,
            source.ctypes.data,
            source.shape[0],
            source.shape[1],
            top,
            top + tall,
            left,
            left + wide,
            target.ctypes.data,
            height,
            width,
        )
        if moved:
            _shifted(resized, 0, 0, down, right, mirrored, edge, image)
    elif moved:
        _shifted(source, top, left, down, right, mirrored, edge, image)
    else:
        image[:] = source[top : top + height, left : left + width]


@_compiled
def decode(
    handle: int,
    file: int,
    keys: npt.NDArray[np.uint32],
    stored: tuple[npt.NDArray[Any], ...],
    windows: npt.NDArray[np.int32],
    moves: npt.NDArray[np.int32],
    edge: bool,
    buffers: tuple[npt.NDArray[np.uint8], ...],
    images: npt.NDArray[np.uint8],
    verdicts: npt.NDArray[np.uint8],
) -> None:
    """Read, check, decode, crop, resize, mirror and shift N images.

    Args:
        handle: of this thread's decoder.
        file: descriptor of the open file.
        keys: uint32, of the checksums, as many as the largest image needs.
        stored: of each image its first byte in the file and its bytes, uint64 (N,); height and
            width, int32 (N, 2); mode, uint8 (N,); checksum, uint64 (N,). See ``beton.Index``.
        windows: int32 (N, 4), top, left, height, width of what is resized to the whole image.
        moves: int32 (N, 3): rows and columns by which the result looks further down and right,
            and whether it is mirrored before.
        edge: what a move uncovers repeats the border instead of being black.
        buffers: three uint8 arrays of this thread, as large as the bytes of any stored image, as
            the pixels of any that is a JPEG, and as one image of the result.
        images: uint8 (N, H, W, C), the result.
        verdicts: uint8 (N,), the result: ``GOOD`` or another of these.
    """
    pointers, sizes, shapes, modes, checksums = stored
    read, decoded, resized = buffers
    channels = images.shape[3]
    for number in range(len(images)):
        data = read[: np.int64(sizes[number])]
        if _read(file, data.ctypes.data, data.size, pointers[number]) != data.size:
            verdicts[number] = UNREADABLE
            continue
        if _checksum(data, keys) != checksums[number]:
            verdicts[number] = DAMAGED
            continue
        rows, columns = np.int64(shapes[number, 0]), np.int64(shapes[number, 1])
        pixels = data
        if modes[number] == JPG:
            pixels = decoded[: rows * columns * 3]
            size, source_bytes, target = data.size, data.ctypes.data, pixels.ctypes.data
            if _decompress(handle, source_bytes, size, target, columns, 0, rows, _RGB, _ACCURATE):
                verdicts[number] = NO_IMAGE
                continue
        source = pixels.reshape(rows, columns, channels)
        _cut(source, windows[number], moves[number], edge, resized, images[number])


@_compiled
def normalize(
    images: npt.NDArray[np.uint8],
    mean: npt.NDArray[np.floating],
    std: npt.NDArray[np.floating],
    normalized: npt.NDArray[np.floating],
) -> None:
    """Scale pixels to [0, 1], subtract the mean, divide by the deviation.

    Args:
        images: uint8 (N, H, W, C).
        mean: (W * C,), that of each channel, over and over, so that a row is one vector loop.
        std: (W * C,), as ``mean``.
        normalized: (N, H, W, C) of the type of ``mean``, the result.
    """
    count, height, width, channels = images.shape
    length = width * channels
    source = images.reshape(count * height, length)
    target = normalized.reshape(count * height, length)
    white = mean.dtype.type(255)
    for row in range(count * height):
        for place in range(length):
            scaled = mean.dtype.type(source[row, place]) / white
            target[row, place] = (scaled - mean[place]) / std[place]
