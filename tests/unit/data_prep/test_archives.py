from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import socket
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep import DataError
from data_prep.raw.archives import Tree, open_tree
from tests.unit.data_prep.raw_files import silent, write_files, write_tar, write_zip

FILES = {
    "train/cat/b.jpg": b"b" * 700,
    "train/cat/deep/a.jpg": b"",
    "train/dog/c.jpg": bytes(range(256)) * 40,
    "train/dog.txt": b"beside",
    "list.txt": b"a list",
}
HIDDEN = {".DS_Store": b"x", "train/cat/._b.jpg": b"x", "__MACOSX/train/cat/b.jpg": b"x"}


def contents(tree: Tree, below: str = "") -> dict[str, bytes]:
    names = tree.files(below)
    split = tree.split(names, np.zeros(len(names), dtype=np.int64))
    assert split.states()[:, 0].tolist() == [len(split.read(index)) for index in range(len(names))]
    return {name: split.read(index) for index, name in enumerate(names)}


@pytest.mark.parametrize(
    ("write", "name"), [(write_files, "files"), (write_zip, "a.zip"), (write_tar, "a.tar")]
)
def test_folder_and_archives_are_the_same_tree_without_hidden_files(
    write: Callable[[Path, dict[str, bytes]], Path], name: str, tmp_path: Path
) -> None:
    write(tmp_path / name, FILES | HIDDEN)
    tree = open_tree(tmp_path / name, silent)
    assert tree.folders() == ["train"] and tree.folders("train") == ["cat", "dog"]
    assert tree.folders("missing") == [] and tree.files("missing") == []
    assert tree.files("train/dog") == ["train/dog/c.jpg"]  # not train/dog.txt
    assert tree.files("train", deep=False) == ["train/dog.txt"]
    assert tree.files(deep=False) == ["list.txt"] and tree.files("train/cat", deep=False) == [
        "train/cat/b.jpg"
    ]
    assert list(contents(tree)) == sorted(FILES) and contents(tree) == FILES
    assert tree.has("list.txt") and not tree.has("train") and not tree.has("nothing")
    assert tree.read("list.txt") == b"a list"
    split = tree.split(["list.txt", "train/cat/b.jpg"], np.array([3, 4]))
    last = split.take(np.array([1]))
    assert (last.read(0), last.labels.tolist(), len(last)) == (b"b" * 700, [4], 1)
    assert last.name(0).startswith(str(tmp_path / name)) and "train/cat/b.jpg" in last.name(0)


@pytest.mark.parametrize(
    ("write", "name"), [(write_files, "files"), (write_zip, "a.zip"), (write_tar, "a.tar")]
)
def test_a_split_travels_between_processes_and_keeps_no_file_open(
    write: Callable[[Path, dict[str, bytes]], Path], name: str, tmp_path: Path
) -> None:
    write(tmp_path / name, FILES)
    before = len(list(Path("/proc/self/fd").iterdir()))
    split = open_tree(tmp_path / name, silent).split(sorted(FILES), np.arange(5))
    copy = pickle.loads(pickle.dumps(split))
    assert [copy.read(index) for index in range(5)] == [FILES[name] for name in sorted(FILES)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_strange_names_are_those_that_python_finds(form: int, tmp_path: Path) -> None:
    names = {"./here.jpg": b"1", "f" * 90 + "/" + "g" * 90 + ".jpg": b"22"}
    if form != tarfile.USTAR_FORMAT:
        names |= {"h" * 150 + "/" + "i" * 150 + ".jpg": b"333", "übung/ß.jpg": b"4"}
    write_tar(tmp_path / "a.tar", names, form)
    with tarfile.open(tmp_path / "a.tar") as archive:
        expected = {member.name.removeprefix("./"): member.offset_data for member in archive}
    tree = open_tree(tmp_path / "a.tar", silent)
    assert contents(tree) == {name.removeprefix("./"): data for name, data in names.items()}
    split = tree.split(sorted(expected), np.zeros(len(expected), dtype=np.int64))
    assert vars(split)["offsets"].tolist() == [expected[name] for name in sorted(expected)]


def test_archives_in_a_tar_are_folders_of_it(tmp_path: Path) -> None:
    inner = {}
    for wnid in ("n02", "n01"):
        write_tar(
            tmp_path / "inner.tar", {f"{wnid}_{i}.JPEG": f"{wnid} {i}".encode() for i in (2, 1)}
        )
        inner[f"{wnid}.tar"] = (tmp_path / "inner.tar").read_bytes()
    write_tar(tmp_path / "outer.tar", inner)
    tree = open_tree(tmp_path / "outer.tar", silent)
    assert tree.folders() == ["n01", "n02"]
    assert contents(tree, "n01") == {"n01/n01_1.JPEG": b"n01 1", "n01/n01_2.JPEG": b"n01 2"}
    assert contents(tree, "n02") == {"n02/n02_1.JPEG": b"n02 1", "n02/n02_2.JPEG": b"n02 2"}


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    write_zip(tmp_path / "inner.zip", {"x.jpg": b"x"})
    inner = (tmp_path / "inner.zip").read_bytes()
    write_tar(tmp_path / "a.tar", {"train/a.jpg": b"a", "inner.zip": inner})
    assert zipfile.is_zipfile(tmp_path / "a.tar")
    assert open_tree(tmp_path / "a.tar", silent).files() == ["inner.zip", "train/a.jpg"]


def test_a_tar_that_is_cut_anywhere_is_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "inner.tar", {"x.jpg": b"x" * 600, "y.jpg": b"y" * 600})
    write_tar(tmp_path / "a.tar", {"n01.tar": (tmp_path / "inner.tar").read_bytes(), "z": b"z"})
    whole = (tmp_path / "a.tar").read_bytes()
    used = len(whole.rstrip(b"\0"))
    cut = tmp_path / "cut.tar"
    for length in range(0, used, 128):
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"^{cut} is (cut|damaged|empty)") as caught:
            open_tree(cut, silent)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_a_header_of_a_tar_is_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": b"x" * 600})
    whole = (tmp_path / "a.tar").read_bytes()
    for position in [*range(0, 5), *range(124, 135), 156, 500]:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.tar is damaged: no tar header at byte 0; "):
            open_tree(tmp_path / "a.tar", silent)


def add_to_tar(name: str, kind: bytes, place: Path) -> None:
    with tarfile.open(place, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "target"
        archive.addfile(member)


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("a/link.jpg", tarfile.SYMTYPE, "is a link or a device"),
        ("a/link.jpg", tarfile.LNKTYPE, "is a link or a device"),
        ("a/null", tarfile.CHRTYPE, "is a link or a device"),
        ("a/../../x.jpg", tarfile.REGTYPE, "leads out of the folder"),
        ("/x.jpg", tarfile.REGTYPE, "leads out of the folder"),
    ],
)
def test_a_hostile_tar_is_refused(name: str, kind: bytes, problem: str, tmp_path: Path) -> None:
    add_to_tar(name, kind, tmp_path / "a.tar")
    with pytest.raises(DataError, match=problem) as caught:
        open_tree(tmp_path / "a.tar", silent)
    assert f"a.tar:{name}" in str(caught.value)


def test_a_name_twice_in_a_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("x.jpg"))
    with pytest.raises(DataError, match=r"a\.tar:x\.jpg is there twice"):
        open_tree(tmp_path / "a.tar", silent)


def test_a_compressed_tar_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x.jpg"))
    with pytest.raises(DataError, match=r"a\.tgz is no folder, ZIP .*: unpack it"):
        open_tree(tmp_path / "a.tgz", silent)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (gzip.compress(b"", mtime=0), "is compressed by gzip, no plain tar archive: unpack it"),
        (bz2.compress(b"x", 1), "is compressed by bzip2, no plain tar archive: unpack it"),
        (lzma.compress(b"x"), "is compressed by xz, no plain tar archive: unpack it"),
        (b"PK\x03\x04 and so on", "is a ZIP archive, no plain tar archive: unpack it"),
        (b"", "is empty: no file is in it"),
        (bytes(10240), "is empty: no file is in it"),
    ],
    ids=["gzip", "bzip2", "xz", "zip", "no bytes", "no members"],
)
def test_what_only_its_name_calls_a_tar_is_said(
    content: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_tree(tmp_path / "a.tar", silent)
    assert str(caught.value) == f"{tmp_path}/a.tar {problem}"


def with_size_field(place: Path, field: bytes) -> None:
    """Write a size, as it stands, into the first header of a tar archive, and a right checksum."""
    content = bytearray(place.read_bytes())
    content[124:136] = field
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    place.write_bytes(content)


@pytest.mark.parametrize(
    "field", [b"-0000001000\0", b"-00000002000", b"+0000000010\0", b"0_1\0" * 3]
)
def test_a_size_in_a_tar_that_is_no_plain_octal_number_is_damage(
    field: bytes, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": b"x" * 600})
    with_size_field(tmp_path / "a.tar", field)
    with pytest.raises(DataError, match=r"a\.tar is damaged: no tar header at byte 0; delete it"):
        open_tree(tmp_path / "a.tar", silent)


def test_archives_nested_deeper_than_those_of_imagenet_are_refused(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "a.tar", {"x.jpg": b"x"}).read_bytes()
    for _ in range(1500):
        header = tarfile.TarInfo("n.tar")
        header.size = len(inner)
        inner = header.tobuf() + inner
    (tmp_path / "a.tar").write_bytes(inner)
    with pytest.raises(DataError) as caught:
        open_tree(tmp_path / "a.tar", silent)
    assert str(caught.value) == (
        f"{tmp_path}/a.tar:n/n.tar is the third archive, one within the other: unpack it"
    )


def test_posix_records_are_told_apart_by_their_lengths(tmp_path: Path) -> None:
    # A value may hold what looks like another record.
    records = {"comment": "first\n22 path=elsewhere.jpg\n", "path": "true.jpg"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("short.jpg")
        member.pax_headers = records
        archive.addfile(member)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == ["true.jpg"]
    assert open_tree(tmp_path / "a.tar", silent).files() == ["true.jpg"]


@pytest.mark.parametrize(
    "record", [b"99 path=x\n", b"2 path=x\n", b"path=x\n", b"\0" * 9, b"-9 p=\n"]
)
def test_a_posix_record_of_a_wrong_length_is_damage(record: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("header")
        member.type, member.size = tarfile.XHDTYPE, len(record)
        archive.addfile(member, io.BytesIO(record))
    with pytest.raises(DataError, match=r"a\.tar is damaged: no names of files at byte 512; del"):
        open_tree(tmp_path / "a.tar", silent)


def evil_member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


def link_member() -> zipfile.ZipInfo:
    member = evil_member("a/link.jpg")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


def bzip2_member() -> zipfile.ZipInfo:
    member = evil_member("a/x.jpg")
    member.compress_type = zipfile.ZIP_BZIP2
    return member


@pytest.mark.parametrize(
    ("member", "content", "problem"),
    [
        (evil_member("../x.jpg"), b"x", "leads out of the folder"),
        (evil_member("a/../../x.jpg"), b"x", "leads out of the folder"),
        (evil_member("a\\..\\..\\x.jpg"), b"x", "leads out of the folder"),
        (evil_member("/x.jpg"), b"x", "leads out of the folder"),
        (evil_member("C:/x.jpg"), b"x", "leads out of the folder"),
        (link_member(), b"/etc/passwd", "is a link"),
        (bzip2_member(), b"x", "is neither stored nor deflated"),
        (
            evil_member("a/bomb.jpg"),
            bytes(2 << 20),
            r"is a bomb \([\d,]+ bytes unpack to 2,097,152\)",
        ),
    ],
    ids=lambda value: getattr(value, "filename", ""),
)
def test_a_hostile_zip_is_refused(
    member: zipfile.ZipInfo, content: bytes, problem: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.jpg", b"good")
        archive.writestr(member, content)
    with pytest.raises(DataError, match=problem) as caught:
        open_tree(tmp_path / "a.zip", silent)
    assert f"a.zip:{member.filename}" in str(caught.value) and "\n" not in str(caught.value)


def patch_directory(place: Path, offset: int, change: Callable[[int], int], size: int = 4) -> None:
    """Change a number in the first entry of a ZIP archive's directory."""
    content = bytearray(place.read_bytes())
    start = content.index(b"PK\x01\x02") + offset
    number = int.from_bytes(content[start : start + size], "little")
    content[start : start + size] = change(number).to_bytes(size, "little")
    place.write_bytes(content)


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"x.jpg": b"x"})
    patch_directory(tmp_path / "a.zip", 8, lambda flags: flags | 1, size=2)
    with pytest.raises(DataError, match=r"a\.zip:x\.jpg is encrypted: the archive is refused"):
        open_tree(tmp_path / "a.zip", silent)


def test_an_absurd_size_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"x.jpg": b"x"})
    patch_directory(tmp_path / "a.zip", 24, lambda size: 300 << 20)
    with pytest.raises(DataError, match=r"a\.zip:x\.jpg is of 314,572,800 bytes, more than any"):
        open_tree(tmp_path / "a.zip", silent)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_in_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.jpg", b"1")
        archive.writestr("x.jpg", b"2")
    with pytest.raises(DataError, match=r"a\.zip:x\.jpg is there twice"):
        open_tree(tmp_path / "a.zip", silent)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("difference", [-1, 1])
def test_a_member_of_another_size_than_announced_is_one_line(
    method: int, difference: int, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("x.jpg", b"some bytes" * 9)
    patch_directory(tmp_path / "a.zip", 24, lambda size: size + difference)
    tree = open_tree(tmp_path / "a.zip", silent)
    with pytest.raises(DataError, match=r"a\.zip:x\.jpg is not of the (89|91) bytes that it annou"):
        tree.read("x.jpg")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_in_a_member_never_gives_other_bytes(method: int, tmp_path: Path) -> None:
    content = b"aabbccdd" * 4
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("x.jpg", content)
        first = 30 + len("x.jpg")
        size = archive.getinfo("x.jpg").compress_size
    whole = (tmp_path / "a.zip").read_bytes()
    refused = 0
    for bit in range(8 * first, 8 * (first + size)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.zip").write_bytes(damaged)
        try:
            assert open_tree(tmp_path / "a.zip", silent).read("x.jpg") == content
        except DataError as error:
            assert str(error).startswith(f"{tmp_path}/a.zip:x.jpg is ")
            refused += 1
    assert refused > 7 * size  # at the end of deflated data are bits that mean nothing


def test_a_zip_that_is_cut_anywhere_is_one_line(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"x.jpg": b"x" * 300, "y.jpg": b"y" * 300})
    whole = (tmp_path / "a.zip").read_bytes()
    cut = tmp_path / "cut.zip"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(
            DataError, match=rf"^{cut} is cut or no ZIP archive \(.+\): delete it and get it again$"
        ):
            open_tree(cut, silent)


def test_a_cut_after_the_listing_is_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": b"x" * 600})
    write_zip(tmp_path / "a.zip", {"x.jpg": b"x" * 600})
    for place in (tmp_path / "a.tar", tmp_path / "a.zip"):
        tree = open_tree(place, silent)
        os.truncate(place, 530)
        with pytest.raises(DataError, match=rf"^{place}:x\.jpg is "):
            tree.read("x.jpg")


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_files(tmp_path / "files", {"cat/a.jpg": b"a"})
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "train").symlink_to(tmp_path / "files")
    tree = open_tree(tmp_path / "tree", silent)
    assert contents(tree) == {"train/cat/a.jpg": b"a"}
    (tmp_path / "files" / "cat" / "again").symlink_to(tmp_path / "files")
    with pytest.raises(DataError) as caught:
        tree.files()
    assert str(caught.value) == (
        f"{tmp_path}/tree/train/cat/again is a link to a folder in which it lies itself: remove it"
    )


def test_backslashes_of_a_zip_made_on_windows_part_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("train\\", "train\\cat\\a.jpg", "train/dog/b.jpg"):
            archive.writestr(name, name)
    tree = open_tree(tmp_path / "a.zip", silent)
    assert tree.folders("train") == ["cat", "dog"]
    assert tree.read("train/cat/a.jpg") == b"train\\cat\\a.jpg"


@pytest.fixture
def special_files(tmp_path: Path) -> Iterator[Path]:
    """A folder with a pipe, a socket, and links: to the pipe, to nothing, and to itself."""
    write_files(tmp_path / "files", {"a.jpg": b"a"})
    os.mkfifo(tmp_path / "files" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "files" / "socket.jpg"))
        for name, target in {"link": "pipe.jpg", "gone": "nothing", "self": "self.jpg"}.items():
            (tmp_path / "files" / f"{name}.jpg").symlink_to(target)
        yield tmp_path / "files"


def test_only_regular_files_are_listed_and_read(special_files: Path) -> None:
    tree = open_tree(special_files, silent)
    names = tree.files()
    assert names == ["a.jpg", "gone.jpg", "link.jpg", "self.jpg"]
    assert tree.special == {"pipe.jpg", "socket.jpg"}
    split = tree.split(names, np.zeros(4, dtype=np.int64))
    # What cannot be read does not keep the others from being listed.
    assert split.states()[:, 0].tolist() == [1, -1, 0, -1]
    assert split.read(0) == b"a"
    with pytest.raises(FileNotFoundError):
        split.read(1)
    with pytest.raises(DataError, match=r"^.*link\.jpg is no regular file$"):
        split.read(2)
    with pytest.raises(OSError, match="Too many levels"):
        split.read(3)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    large = tmp_path / "files" / "large.jpg"
    write_files(tmp_path / "files", {"large.jpg": b""})
    os.truncate(large, (256 << 20) + 1)
    member = tarfile.TarInfo("large.jpg")
    member.size = (256 << 20) + 1
    (tmp_path / "a.tar").write_bytes(member.tobuf())
    os.truncate(tmp_path / "a.tar", 512 + (257 << 20))
    for place in (tmp_path / "files", tmp_path / "a.tar"):
        with pytest.raises(DataError, match=r"large\.jpg is of 268,435,457 bytes, more than any i"):
            open_tree(place, silent).read("large.jpg")


def test_names_are_printable_on_one_line_and_files_are_read_by_their_true_names(
    tmp_path: Path,
) -> None:
    name = os.fsdecode(b"\xff\n\xc3\xbc.jpg")
    write_files(tmp_path / "files", {name: b"x"})
    write_tar(tmp_path / "a.tar", {name: b"x"})
    for place, sign in ((tmp_path / "files", "/"), (tmp_path / "a.tar", ":")):
        tree = open_tree(place, silent)
        split = tree.split(tree.files(), np.zeros(1, dtype=np.int64))
        assert split.name(0) == f"{place}{sign}\\xff\\nü.jpg" and split.read(0) == b"x"
