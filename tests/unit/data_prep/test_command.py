from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from data_prep import __main__ as command
from data_prep.__main__ import main
from tests.pictures import write_class_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("raw") / "pets")


def test_the_command_prepares_lists_and_reports_errors_with_code_2(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"prepared={tmp_path / 'new'}"
    assert main(["digits", place]) == 0
    assert "1,437 train + 360 test images, 8 MB, written and verified" in capsys.readouterr().out
    assert main(["digits", f"data.{place}"]) == 0
    assert "already prepared" in capsys.readouterr().out

    raw = tmp_path / "raw"
    shutil.copytree(folders, raw)
    bad = raw / "train" / "cat" / "001.jpg"
    bad.write_bytes(b"")
    settings = [f"raw={raw}", "side=40", "quality=80", "passthrough=false", "processes=1"]
    assert main(["folder", place, *settings]) == 0
    out = capsys.readouterr().out
    assert "47 train + 12 test images" in out
    assert f"1 bad images were left out, listed in {tmp_path / 'new'}" in out and str(bad) in out

    for arguments, line in (
        (["digit"], "unknown data set 'digit': did you mean 'digits'?"),
        (["digits", "sid=3"], "unknown setting 'sid=3': write name=value or data.name=value; na"),
        (["imagenet", "quality=high"], "'quality=high': data.quality is of the JPEG encoder"),
        (["imagenet", "data.side=x"], "'data.side=x': data.side is longest side of a stored"),
        (["digits", "prepared="], "'prepared=': data.prepared is folder of prepared data sets"),
        (["digits", "data.bad_share=2"], "data.bad_share=2 is no share"),
        (["digits", "side=64"], "have no effect on digits"),
    ):
        assert main([*arguments, place]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and line in error and error.count("\n") == 1

    assert main(["--list"]) == 0
    assert "tinyimagenet: Tiny ImageNet" in capsys.readouterr().out


def test_whatever_bytes_a_name_has_it_is_shown_on_one_line(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(folders, raw)
    bad = raw / "train" / "cat" / os.fsdecode(b"a\xff\n\x1b[31mb.jpg")
    bad.write_bytes(b"")
    settings = [f"raw={raw}", f"prepared={tmp_path / 'new'}"]
    assert main(["folder", *settings]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and out.rstrip().endswith("b.jpg: the file is empty")
    assert main(["folder", *settings, "bad_share=0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "\x1b" not in error and "b.jpg: the file is empty" in error


def test_the_command_tells_how_far_it_is(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "_REPORT_INTERVAL", 0.0)
    assert main(["folder", f"raw={folders}", f"prepared={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"write train: 32 of 48, [\d,]+/s, \d+ s left", line) for line in lines)
    assert any(line.startswith("verify test: 12 of 12, ") for line in lines)
