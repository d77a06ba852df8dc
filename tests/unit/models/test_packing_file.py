"""What is no packed network, or no longer one, is refused in one line and takes no memory."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from models import ModelError, create_model, pack, read_packed, unpack
from models.packing.file import check_size

ROOT = Path(__file__).parents[3]

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = create_model("lenet5", "step+ternary", num_classes=3, in_channels=1, image_size=12)
    file = tmp_path_factory.mktemp("packed") / "network.safetensors"
    return pack(network, file, metadata={"class_names": ["a", "b", "c"]}).path


def refusal(data: bytes, folder: Path) -> str:
    """Return why these bytes are refused, in the same way by both readers."""
    file = folder / "hostile.safetensors"
    file.write_bytes(data)
    messages = set()
    for read in (read_packed, unpack):
        with pytest.raises(ModelError) as caught:
            read(file)
        messages.add(str(caught.value).removeprefix(f"{file} is "))
    (message,) = messages
    assert "\n" not in message
    return message


def signed(header: str, tensors: bytes, length: int | None = None) -> bytes:
    """Lay a file out with the digest that its bytes have, as somebody with bad intentions would."""
    text = header.encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text) if length is None else length) + text + tensors
    at = data.index(rb"{\"sha256\":\"") + len(rb"{\"sha256\":\"")
    blank = data[:at] + b"0" * 64 + data[at + 64 :]
    return data[:at] + hashlib.sha256(blank).hexdigest().encode() + data[at + 64 :]


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return the header of a file, the description in it, and the bytes behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["packed_network"]), data[8 + length :]


def forged(
    path: Path, in_header: Change | None = None, in_description: Change | None = None
) -> Any:
    header, description, tensors = parts(path)
    if in_description is not None:
        in_description(description)
    header["__metadata__"]["packed_network"] = json.dumps(description, separators=(",", ":"))
    if in_header is not None:
        in_header(header)
    return signed(json.dumps(header, separators=(",", ":")), tensors)


def test_a_forged_file_without_a_change_is_read(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "same.safetensors"
    file.write_bytes(forged(path))
    assert file.read_bytes() == path.read_bytes()
    assert read_packed(file).metadata == {"class_names": ["a", "b", "c"]}


def test_any_reader_of_safetensors_sees_the_tensors_and_one_text(path: Path) -> None:
    packed = read_packed(path)
    with safe_open(path, framework="np") as file:
        names = file.keys()
        sizes = [file.get_tensor(name).nbytes for name in names]
        (text,) = file.metadata().values()
    assert sum(sizes) == packed.tensor_bytes
    assert [layer["name"] for layer in json.loads(text)["layers"]] == [
        x.name for x in packed.layers
    ]


@settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_anywhere_is_noticed(
    data: st.DataObject, path: Path, tmp_path: Path
) -> None:
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del whole[place:]
    message = refusal(bytes(whole), tmp_path)
    assert message.startswith(("damaged: its bytes are not those", "no packed network"))


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


BEGINNING = '{"__metadata__":{"packed_network":"{\\"sha256\\":\\"' + "0" * 64


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no packed network"),
        (b"\x00" * 100, "no packed network"),
        (struct.pack("<Q", 2**63) + b"{}", "no packed network"),
        (signed(BEGINNING + '\\"}"}}', b"")[8:], "no packed network"),
        (struct.pack("<Q", 2**60) + signed(BEGINNING, b"")[8:], "damaged"),
        (signed(BEGINNING, b"", length=2**62), "its header is longer than the file"),
        (signed(BEGINNING, b""), "its header is not JSON"),
        (signed(BEGINNING + '\\"}"},"a":' + nested(100_000) + "}", b""), "its header is not JSON"),
        (signed(BEGINNING + '\\",\\"a\\":' + nested(100_000) + '}"}}', b""), "header is not JSON"),
        (signed(BEGINNING + '\\"}"},"a":1}', b""), "a is no tensor of U8, F32, F16"),
        (signed(BEGINNING + '\\"}","b":"c"}}', b""), "metadata beside its description"),
        (signed(BEGINNING + '\\"}"},"a":{},"a":{}}', b""), "a key occurs twice"),
        (signed(BEGINNING + '\\",\\"a\\":1,\\"a\\":1}"}}', b""), "a key occurs twice"),
        (signed(BEGINNING + '\\"}"}}', b""), "it is of version None, and this program reads"),
        (signed(BEGINNING + '\\",\\"version\\":2}"}}', b""), "it is of version 2, and this"),
        (signed(BEGINNING + '\\",\\"version\\":1}"}}', b""), "lacks entries or has unknown ones"),
    ],
)
def test_what_is_no_packed_network_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(data, tmp_path)


def bank(description: dict[str, Any]) -> dict[str, Any]:
    layer = next(layer for layer in description["layers"] if "bank" in layer)
    entries: dict[str, Any] = layer["bank"]
    return entries


HEADERS: dict[str, tuple[Change, str]] = {
    "a tensor that is missing": (
        lambda h: h.pop("conv1.mix.weight"),
        "do not lie as they should",
    ),
    "tensors that overlap": (
        lambda h: h["bn1.scale"].update(data_offsets=h["bn1.shift"]["data_offsets"]),
        "do not lie as they should",
    ),
    "a tensor beyond the end": (
        lambda h: h["bn1.scale"].update(data_offsets=[0, 2**50]),
        "do not lie as they should",
    ),
    "a tensor of an absurd shape": (
        lambda h: h["bn1.scale"].update(shape=[2**62]),
        "do not lie as they should",
    ),
    "a tensor of another type": (
        lambda h: h["bn1.scale"].update(dtype="I64"),
        "bn1.scale is no tensor of U8, F32, F16",
    ),
    "codes of another shape": (
        lambda h: h["conv1.mix.weight"].update(shape=[1, *h["conv1.mix.weight"]["shape"]]),
        "conv1.mix.weight is not there, or not of the shape",
    ),
}

DESCRIPTIONS: dict[str, tuple[Change, str]] = {
    "an unknown entry": (lambda d: d.update(code="import os"), "has unknown ones"),
    "a blueprint that is no text": (
        lambda d: d["blueprint"].update(backbone=["lenet5"]),
        "has unknown ones",
    ),
    "a blueprint of other arguments": (
        lambda d: d["blueprint"].update(device="cuda"),
        "has unknown ones",
    ),
    "a call string without end": (
        lambda d: d["blueprint"].update(backbone="lenet5(width=" + "-" * 100_000 + "1)"),
        "has unknown ones",
    ),
    "a layer twice": (lambda d: d["layers"].append(d["layers"][1]), "a layer is described twice"),
    "a layer that is no layer": (lambda d: d["layers"].append(1), "in another way than layers are"),
    "a layer of another format": (
        lambda d: d["layers"][1].update(format="1-bit"),
        "is described as no weight can be",
    ),
    "a layer too large": (
        lambda d: d["layers"][0].update(
            shape=[10**6, 10**6, 3, 3], storage={**d["layers"][0]["storage"], "count": 9 * 10**12}
        ),
        "cannot hold a network of",
    ),
    "a negative count": (
        lambda d: d["layers"][1]["storage"].update(count=-1),
        "in another way than layers are",
    ),
    "a bank of unknown patterns": (
        lambda d: bank(d).update(families=["gabor"]),
        "is described as no weight can be",
    ),
    "a bank without groups": (
        lambda d: bank(d).update(groups=0),
        "is described as no weight can be",
    ),
    "a bank that is a digest alone": (
        lambda d: d["layers"][0].update(bank={"sha256": "00" * 32}),
        "is described as no weight can be",
    ),
    "a digest that is none": (
        lambda d: bank(d).update(sha256="zz" * 32),
        "is described as no weight can be",
    ),
    "a frozen weight that comes from nowhere": (
        lambda d: d["layers"][0].pop("bank"),
        "is described as no weight can be",
    ),
    "a shape whose product is zero in 64 bits": (
        lambda d: d["layers"][0].update(
            shape=[2**32, 2**30, 2, 2], storage={**d["layers"][0]["storage"], "count": 2**64}
        ),
        "cannot hold a network of 18446744073709",
    ),
    "another codebook than the scales have": (
        lambda d: d["layers"][1].update(codebook="magnitudes by filter"),
        "is described as no weight can be",
    ),
    "metadata that is no number": (
        lambda d: d["metadata"].update(top1=float("nan")),
        "NaN is no finite number",
    ),
    "metadata without bounds": (
        lambda d: d["metadata"].update(top1=float("inf")),
        "Infinity is no finite number",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_forged_header_is_refused(case: str, path: Path, tmp_path: Path) -> None:
    change, reason = HEADERS[case]
    assert reason in refusal(forged(path, in_header=change), tmp_path)


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_forged_description_is_refused(case: str, path: Path, tmp_path: Path) -> None:
    change, reason = DESCRIPTIONS[case]
    assert reason in refusal(forged(path, in_description=change), tmp_path)


UNPACKED: dict[str, tuple[Change, str]] = {
    "a blueprint that computes": (
        lambda d: d["blueprint"].update(backbone="lenet5(width=10**9)"),
        "cannot read",
    ),
    "a network without end": (
        lambda d: d["blueprint"].update(backbone="lenet5(width=1000000000)"),
        "cannot hold a network of|cannot be built",
    ),
    "a network of too many classes": (
        lambda d: d["blueprint"].update(num_classes=10**9),
        "cannot hold a network of",
    ),
    "a bank of too many channels": (  # 24,000 weights in the float network, 225 million in the bank
        lambda d: d["blueprint"].update(in_channels=3000),
        "cannot hold a network of",
    ),
    "an unknown network": (
        lambda d: d["blueprint"].update(backbone="os.system"),
        "cannot read 'os.system'",
    ),
    "deep nesting": (
        lambda d: d["blueprint"].update(backbone="lenet5(width=" + "(" * 400 + "1)"),
        "cannot read",
    ),
    "another network": (lambda d: d["blueprint"].update(backbone="resnet20"), "the file has no"),
    "another method": (lambda d: d["blueprint"].update(method="float"), "the file has no|another"),
    "another seed of the patterns": (lambda d: bank(d).update(seed=1), "patterns of seed 1, but"),
    "another digest of the patterns": (
        lambda d: bank(d).update(sha256="00" * 32),
        "of sha256 0000",
    ),
}


@pytest.mark.parametrize("case", UNPACKED)
def test_a_forged_blueprint_builds_nothing(case: str, path: Path, tmp_path: Path) -> None:
    change, reason = UNPACKED[case]
    file = tmp_path / "hostile.safetensors"
    file.write_bytes(forged(path, in_description=change))
    read_packed(file)
    tracemalloc.start()
    with pytest.raises(ModelError, match=reason) as caught:
        unpack(file)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50e6
    assert str(caught.value).startswith(f"{file} cannot be unpacked: ")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module", params=["seed", "patterns", "2-bit"])
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = create_model("lenet5", "step", num_classes=3, in_channels=1, image_size=12)
    file = tmp_path_factory.mktemp("coded") / "network.safetensors"
    return pack(network, file, weights=request.param).path


def test_a_bank_in_codes_is_the_one_of_its_digest(coded: Path, tmp_path: Path) -> None:
    file = tmp_path / "hostile.safetensors"
    for change, reason in (
        (lambda d: bank(d).update(sha256="00" * 32), "SHA-256 0000|sha256 0000"),
        (lambda d: bank(d).update(version="keyed-7"), "keyed-7|not those with the SHA-256"),
        (lambda d: bank(d)["scales"].reverse(), "not those with the SHA-256|of scales"),
    ):
        file.write_bytes(forged(coded, in_description=change))
        with pytest.raises(ModelError, match=reason):
            unpack(file)


@pytest.mark.parametrize(("kernel", "version"), [(100, "keyed-1"), (100, "original-1")])
@pytest.mark.parametrize("family", ["haar", "lbp"])
def test_codes_of_huge_kernels_take_no_memory(
    family: str, kernel: int, version: str, tmp_path: Path
) -> None:
    network = create_model("lenet5", "step", num_classes=3, in_channels=1, image_size=12)
    source = pack(network, tmp_path / "network.safetensors", weights="patterns").path

    def enlarge(description: dict[str, Any]) -> None:
        layer = description["layers"][0]
        layer.update(shape=[1, 1, kernel, kernel])
        layer["storage"]["count"] = kernel**2
        layer["bank"].update(families=[family], scales=[1.0], version=version, groups=1)

    file = tmp_path / "hostile.safetensors"
    file.write_bytes(forged(source, in_description=enlarge))
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"not those with the SHA-256|there are no haar patterns"):
        unpack(file)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5e6


REPLACEMENTS: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**64,
    0.5,
    1e300,
    "",
    "ternary",
    [],
    [1],
    {},
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every entry of a JSON value, as its container and its key."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    inner = [value[key] for key in keys if isinstance(value[key], dict | list)]
    return found + [place for container in inner for place in places(container)]


@settings(
    derandomize=True,
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_whatever_a_description_says_it_is_read_or_refused(
    data: st.DataObject, coded: Path, tmp_path: Path
) -> None:
    def spoil(description: dict[str, Any]) -> None:
        container, key = data.draw(st.sampled_from(places(description)))
        container[key] = data.draw(st.sampled_from(REPLACEMENTS))

    file = tmp_path / "hostile.safetensors"
    file.write_bytes(forged(coded, in_description=spoil))
    for read in (read_packed, unpack):
        try:
            read(file)
        except ModelError as error:
            assert "\n" not in str(error)
            assert str(error).startswith(str(file))


def test_values_that_are_not_finite_are_refused(path: Path, tmp_path: Path) -> None:
    header, _, tensors = parts(path)
    start, _ = header["bn1.shift"]["data_offsets"]
    broken = tensors[:start] + struct.pack("<f", float("nan")) + tensors[start + 4 :]
    data = signed(json.dumps(header, separators=(",", ":")), broken)
    assert "bn1.shift has values that are not finite" in refusal(data, tmp_path)


def test_what_is_no_packed_network_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="/dev/zero is no packed network"):
        read_packed("/dev/zero")


def test_a_small_file_may_hold_large_banks_up_to_a_bound() -> None:
    check_size(14_715_584, 40_000)  # vgg16 of unmixed banks and a ternary head
    with pytest.raises(ModelError, match="40000 bytes cannot hold a network of 50000000 weights"):
        check_size(50_000_000, 40_000)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"num_classes": 3, "in_channels": 1, "image_size": 12}
    long_name = create_model("lenet5" + " " * 600, "ternary", **arguments)
    network = create_model("lenet5", "ternary", **arguments)
    twice: dict[Any, str] = {1: "a", "1": "b"}
    for written, metadata in ((long_name, {}), (network, twice)):
        with pytest.raises(ModelError, match="cannot be written, since none could read it"):
            pack(written, tmp_path / "network.safetensors", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_or_no_file_is_refused(tmp_path: Path) -> None:
    for file, reason in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(ModelError, match=f"cannot be read: {reason}"):
            read_packed(file)


def test_a_file_that_cannot_be_replaced_stays_whole(path: Path, tmp_path: Path) -> None:
    network = create_model("lenet5", "ternary", num_classes=3, in_channels=1, image_size=12)
    target = tmp_path / "network.safetensors"
    pack(network, target)
    before = target.read_bytes()
    nn.init.constant_(network.get_submodule("fc2").get_parameter("weight"), torch.inf)
    with pytest.raises(ModelError, match="not finite"):
        pack(network, target)
    assert [file.name for file in tmp_path.iterdir()] == ["network.safetensors"]
    assert target.read_bytes() == before
    assert target.stat().st_mode & 0o444 == path.stat().st_mode & 0o444 != 0


@pytest.mark.slow
def test_another_process_gets_the_same_logits(path: Path, tmp_path: Path) -> None:
    images = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    program = (
        "import sys, torch, models\n"
        "network = models.unpack(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    torch.save(network(torch.load(sys.argv[2])), sys.argv[3])\n"
    )
    files = [str(path), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", program, *files], cwd=ROOT, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(files[2]), unpack(path)(images))
