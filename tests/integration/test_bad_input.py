"""Bad input that only shows when a run begins: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import http.server
import sqlite3
import threading

import pytest

import data_prep

NAME = "digits_lenet5"
SMALL = ("data.synthetic=[64,16]", "train.epochs=1", "train.batch_size=8",
         "train.warmup_epochs=0", "scaling.launcher=local")  # fmt: skip


def error_of(command_line, *arguments: str, **environment: str) -> str:
    """The one line of a refused run; what was said before it are the stages that went well."""
    process = command_line.start("--experiment", NAME, *arguments, **environment)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    *stages, line = output.splitlines()
    assert line.startswith("error: "), output
    assert all(stage.startswith(("prepare ", "note ")) for stage in stages), output
    runs = command_line.folder / "runs" / NAME
    assert not runs.exists(), "a run that could not begin has no folder"
    return line


def test_a_folder_that_cannot_be_written_is_named(command_line):
    line = error_of(command_line, *SMALL, "tracking.enabled=false", "tracking.runs=/sys/runs")
    assert "/sys/runs" in line
    assert "tracking.runs" in line


def test_a_database_in_use_is_named(command_line):
    command_line.run(
        "--experiment", NAME, *SMALL, "tracking.runs=shared", "tracking.register_model=false"
    )
    database = command_line.folder / "shared" / "mlflow.db"
    with sqlite3.connect(database) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        line = error_of(command_line, *SMALL, f"tracking.uri=sqlite:///{database}")
    assert "locked by another process" in line


def test_a_port_in_use_by_another_program_is_named(command_line):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    line = error_of(command_line, *SMALL, MLFLOW_TRACKING_URI=address)
    server.shutdown()
    server.server_close()
    assert address in line
    assert "another program" in line


def test_a_server_that_is_not_there_is_named(command_line):
    line = error_of(command_line, *SMALL, "tracking.uri=http://127.0.0.1:9")
    assert "nothing listens there" in line


def test_missing_data_without_network_says_where_to_put_it(command_line):
    # A proxy that refuses stands for a machine without network.
    line = error_of(
        command_line,
        "dataset=mnist",
        "tracking.enabled=false",
        f"data.root={command_line.folder / 'raw'}",
        https_proxy="http://127.0.0.1:9",
        http_proxy="http://127.0.0.1:9",
    )
    assert str(command_line.folder / "raw" / "mnist") in line
    assert "train-images-idx3-ubyte" in line


@pytest.mark.parametrize("damage", ["cut", "manifest"])
def test_prepared_files_that_do_not_hold_are_refused(command_line, damage, tmp_path):
    folder = data_prep.prepare("digits", prepared=tmp_path, synthetic=(64, 16)).folder
    beton = folder / "train.beton"
    if damage == "cut":
        beton.write_bytes(beton.read_bytes()[: beton.stat().st_size // 2])
    else:
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"train": 64', '"train": 65'))
    mine = f"data.prepared={tmp_path}"
    line = error_of(command_line, *SMALL, "tracking.enabled=false", mine)
    assert str(folder) in line
    assert "delete the folder" in line


def test_a_ray_cluster_that_is_not_there_is_named_at_once(command_line):
    settings = [word for word in SMALL if "launcher" not in word]
    line = error_of(command_line, *settings, "tracking.enabled=false", RAY_ADDRESS="127.0.0.1:9")
    assert "RAY_ADDRESS=127.0.0.1:9" in line
