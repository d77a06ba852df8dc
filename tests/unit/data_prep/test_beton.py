from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import DataError, ffcv_available
from data_prep.beton import (
    JPG,
    PAGE_BYTES,
    RAW,
    BetonWriter,
    checksum,
    checksum_keys,
    read_index,
)
from tests.pictures import picture

SMALLEST_PAGE = 2 << 20


def bytes_of(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8)


def jpeg(image: Image.Image) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)


def write_pictures(path: Path, count: int = 7, growth: int = 1) -> Path:
    """JPEG and raw images in turn, with labels 0, 1, 2, ..., each higher and less wide."""
    with BetonWriter(path, count) as writer:
        for number in range(count):
            image = picture(number, 30 + growth * number, 50 - growth * number)
            if number % 2:
                data = np.asarray(image).reshape(-1)
                writer.append(number, data, image.height, image.width, RAW)
            else:
                writer.append(number, jpeg(image), image.height, image.width, JPG)
    return path


def write_arrays(path: Path, images: np.ndarray, page_bytes: int = PAGE_BYTES) -> Path:
    shape = (images.shape[1], images.shape[2], images.shape[3])
    with BetonWriter(path, len(images), shape=shape, page_bytes=page_bytes) as writer:
        for label, image in enumerate(images):
            writer.append(label, image.reshape(-1))
    return path


READ_WITH_FFCV = """
import sys
import numpy as np
from ffcv.loader import Loader, OrderOption

for path in sys.argv[1:]:
    loader = Loader(path, batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL,
                    drop_last=False)
    batches = [[np.array(field) for field in batch] for batch in loader]
    images, labels, checksums = (np.concatenate(field) for field in zip(*batches))
    np.savez(path + ".npz", images=images, labels=labels)
"""


@pytest.mark.skipif(not ffcv_available(), reason="FFCV is not installed")
@pytest.mark.slow
def test_ffcv_itself_reads_the_same_pixels_and_labels(tmp_path: Path) -> None:
    arrays = np.random.RandomState(0).randint(0, 256, (9, 8, 10, 3)).astype(np.uint8)
    written = [
        write_pictures(tmp_path / "pictures.beton", growth=0),
        write_arrays(tmp_path / "arrays.beton", arrays),
    ]
    subprocess.run([sys.executable, "-c", READ_WITH_FFCV, *map(str, written)], check=True)
    read = [np.load(f"{path}.npz") for path in written]
    assert [file["labels"].ravel().tolist() for file in read] == [list(range(7)), list(range(9))]
    assert np.array_equal(read[1]["images"], arrays)
    for number, pixels in enumerate(read[0]["images"]):
        image = picture(number, 30, 50)
        if number % 2 == 0:
            image = Image.open(io.BytesIO(jpeg(image).tobytes()))
        difference = np.abs(pixels.astype(int) - np.asarray(image)).max()
        assert difference <= (0 if number % 2 else 4)  # FFCV decodes less exactly, to be faster


@pytest.mark.skipif(not ffcv_available(), reason="FFCV is not installed")
def test_ffcvs_own_reader_finds_each_sample_where_the_index_says(tmp_path: Path) -> None:
    path = write_pictures(tmp_path / "train.beton")
    code = (
        "import sys, numba; numba.config.DISABLE_JIT = True\n"
        "from ffcv.reader import Reader\n"
        "reader = Reader(sys.argv[1])\n"
        "print(reader.field_names, reader.num_samples, reader.page_size)\n"
        "print(reader.alloc_table['ptr'].tolist(), reader.metadata['f1'].tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    index = read_index(path)
    assert done.stdout.splitlines() == [
        f"['image', 'label', 'checksum'] 7 {PAGE_BYTES}",
        f"{index.pointers.tolist()} {index.labels.tolist()}",
    ]


def test_the_index_says_what_was_written(tmp_path: Path) -> None:
    path = write_pictures(tmp_path / "train.beton")
    index = read_index(path)
    content = path.read_bytes()
    assert len(index) == 7 and index.channels == 3 and index.shape is None
    for number in range(7):
        image = picture(number, 30 + number, 50 - number)
        start, size = int(index.pointers[number]), int(index.sizes[number])
        data = np.frombuffer(content[start : start + size], dtype=np.uint8)
        assert np.array_equal(data, np.asarray(image).reshape(-1) if number % 2 else jpeg(image))
        assert (index.heights[number], index.widths[number]) == (30 + number, 50 - number)
        assert index.modes[number] == (RAW if number % 2 else JPG)
        assert index.checksums[number] == checksum(data)
    assert index.labels.tolist() == list(range(7))


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_pictures(tmp_path / name) for name in ("a.beton", "b.beton"))
    assert first.read_bytes() == second.read_bytes()


def test_no_image_crosses_the_border_of_a_page(tmp_path: Path) -> None:
    images = np.random.RandomState(0).randint(0, 256, (8, 500, 600, 3)).astype(np.uint8)
    index = read_index(write_arrays(tmp_path / "train.beton", images, SMALLEST_PAGE))
    pages = index.pointers // SMALLEST_PAGE
    assert np.array_equal((index.pointers + index.sizes - np.uint64(1)) // SMALLEST_PAGE, pages)
    assert np.bincount((pages - pages[0]).astype(int)).tolist() == [2, 2, 2, 2]
    content = (tmp_path / "train.beton").read_bytes()
    for image, start in zip(images, index.pointers.tolist(), strict=True):
        assert content[start : start + image.size] == image.tobytes()


def test_an_image_may_fill_a_page_but_not_exceed_it(tmp_path: Path) -> None:
    page = np.zeros(SMALLEST_PAGE, dtype=np.uint8)
    with BetonWriter(tmp_path / "full.beton", 2, page_bytes=SMALLEST_PAGE) as writer:
        writer.append(0, page, 1, 1)
        writer.append(1, page, 1, 1)
    assert np.diff(read_index(tmp_path / "full.beton").pointers).tolist() == [SMALLEST_PAGE]
    with (
        pytest.raises(DataError, match=r"image of 2,097,153 bytes does not fit a page"),
        BetonWriter(tmp_path / "large.beton", 1, page_bytes=SMALLEST_PAGE) as writer,
    ):
        writer.append(0, np.zeros(SMALLEST_PAGE + 1, dtype=np.uint8), 1, 1)


def test_fewer_samples_than_announced_are_those_that_are_there(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "train.beton", 100) as writer:
        writer.append(3, bytes_of(1, 2, 3), 1, 1)
    index = read_index(tmp_path / "train.beton")
    assert len(index) == 1 and index.labels.tolist() == [3] and index.sizes.tolist() == [3]


def test_every_single_bit_changes_the_checksum() -> None:
    for size in (1, 7, 8, 9, 61):
        data = np.random.RandomState(size).randint(0, 256, size).astype(np.uint8)
        expected = checksum(data)
        for place in range(size):
            for bit in range(8):
                damaged = data.copy()
                damaged[place] ^= 1 << bit
                assert checksum(damaged) != expected


def splitmix64(number: int) -> int:
    """The ``number``-th output of the generator with seed 0, in whole numbers of Python."""
    value = number * 0x9E3779B97F4A7C15 % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 61, 4096])
def test_the_checksum_is_nh_of_32_bit_words_with_keys_of_splitmix64(size: int) -> None:
    data = np.random.RandomState(size).randint(0, 256, size).astype(np.uint8)
    total = 0
    for pair in range(-(-size // 8)):
        text = data[8 * pair : 8 * pair + 8].tobytes().ljust(8, b"\0")
        key = splitmix64(pair + 1)
        first = (int.from_bytes(text[:4], "little") + key % 2**32) % 2**32
        second = (int.from_bytes(text[4:], "little") + (key >> 32)) % 2**32
        total += first * second
    assert checksum(data) == (total % 2**64) ^ size


def test_damage_of_a_kind_all_over_an_image_changes_the_checksum() -> None:
    """A bit stuck in memory, words exchanged, a page of zeros: what a plain sum would not see."""
    random = np.random.RandomState(0)
    data = random.randint(0, 256, 4096).astype(np.uint8)
    expected = checksum(data)
    for bit in range(64):
        for pairs in ([3, 400], [0, 1], list(range(0, 512, 2)), random.permutation(512)[:100]):
            damaged = data.copy()
            damaged.reshape(512, 8)[np.asarray(pairs), bit // 8] ^= 1 << (bit % 8)
            assert checksum(damaged) != expected
    for size in (4, 8, 64):
        parts = data.reshape(-1, size)
        for one, other in random.randint(0, len(parts), (100, 2)):
            exchanged = parts.copy()
            exchanged[[one, other]] = exchanged[[other, one]]
            assert checksum(exchanged.reshape(-1)) != expected or one == other
        for part in range(len(parts)):
            emptied = parts.copy()
            emptied[part] = 0
            assert checksum(emptied.reshape(-1)) != expected
    assert checksum(np.zeros(8, np.uint8)) != checksum(np.zeros(16, np.uint8))


def test_compiled_code_has_the_same_checksum() -> None:
    kernels = pytest.importorskip("data_prep.reading.kernels")
    keys = checksum_keys(2048)
    random = np.random.RandomState(1)
    for size in (0, 1, 7, 8, 9, 15, 16, 1000, 4095):
        data = random.randint(0, 256, size + 3).astype(np.uint8)
        for start in range(3):  # whatever their alignment
            assert int(kernels._checksum(data[start : start + size], keys)) == checksum(
                data[start : start + size]
            )


@pytest.mark.parametrize("kept", [0, 10, 3000, SMALLEST_PAGE, -24, -1])
def test_a_cut_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.beton", np.zeros((3, 4, 4, 1), np.uint8), SMALLEST_PAGE)
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    with pytest.raises(DataError, match=rf"^{path} "):
        read_index(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.beton"
    path.write_bytes(bytes(range(256)) * 100)
    with pytest.raises(DataError, match=rf"{path} is no \.beton file"):
        read_index(path)
    with pytest.raises(FileNotFoundError):
        read_index(tmp_path / "none.beton")


def test_a_file_whose_two_tables_differ_is_refused(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "a.beton", np.zeros((3, 4, 4, 1), np.uint8), SMALLEST_PAGE)
    with path.open("r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(b"\1")
    with pytest.raises(DataError, match="its two tables differ"):
        read_index(path)
