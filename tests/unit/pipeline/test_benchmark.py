from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import models
from pipeline.display import Display
from pipeline.experiments import load_experiment
from pipeline.preprocessing import Preprocessing
from pipeline.use.benchmark import benchmark
from pipeline.use.model import UsableModel
from pipeline.use.speed import (
    COMPILED,
    EAGER,
    FLOAT,
    INT8,
    RUNTIMES,
    Benchmark,
    Cell,
    Row,
    benchmark_table,
)

NAME = "digits_lenet5_ternary"


@pytest.fixture
def model(tmp_path: Path) -> UsableModel:
    network = models.create_model("lenet5", "ternary", num_classes=10, in_channels=1, image_size=16)
    packed = models.pack(network, tmp_path / "net.safetensors")
    seen = Preprocessing(
        size=16,
        channels=1,
        crop=None,
        side=None,
        format=None,
        quality=None,
        passthrough=None,
        mean=(0.5,),
        std=(0.5,),
        class_names=tuple("0123456789"),
    )
    return UsableModel("net", NAME, models.unpack(packed.path), packed, seen, load_experiment(NAME))


def cell(runtime: str, milliseconds: float, noise: float = 0.01, threads: int = 1) -> Cell:
    return Cell(runtime, "cpu", "NHWC", 8, threads, milliseconds, milliseconds, noise, 8e3, 1.0)


def row(runtime: str, ours: float, twins: float, noise: float = 0.01) -> Row:
    return Row(cell(runtime, ours, noise), cell(runtime, twins, noise))


def found(*rows: Row, macs: int = 100, twin_macs: int | None = 100) -> Benchmark:
    return Benchmark("digits", "ternary", macs, twin_macs, rows)


@pytest.mark.parametrize(
    "runtimes",
    [(EAGER,), pytest.param((EAGER, FLOAT, INT8), marks=pytest.mark.slow)],
)
def test_every_runtime_is_measured_beside_the_twin(
    runtimes: tuple[str, ...], model: UsableModel
) -> None:
    threads = torch.get_num_threads()
    measured = benchmark(model, Display(), batches=(1, 4), runtimes=runtimes, seconds=0.02)
    assert torch.get_num_threads() == threads
    settings = {(row.model.runtime, row.model.batch) for row in measured.rows}
    assert settings == {(name, batch) for name in runtimes for batch in (1, 4)}
    macs = models.profile(model.network, 16).macs
    for entry in measured.rows:
        assert entry.twin is not None
        for figures in (entry.model, entry.twin):
            seconds = figures.median_ms / 1e3
            assert figures.p90_ms >= figures.median_ms > 0
            assert figures.images_per_second == pytest.approx(figures.batch / seconds)
            # The twin has the same shapes, so as many operations.
            operations = 2 * macs * figures.batch
            assert figures.gflops == pytest.approx(operations / seconds / 1e9)
        assert entry.faster == entry.twin.median_ms / entry.model.median_ms
    assert json.loads(json.dumps(measured.to_dict()))["conclusion"] == measured.conclusion()


def test_equal_times_are_called_no_gain_and_int8_is_compared_with_the_float_twin() -> None:
    text = found(
        row(EAGER, 10, 10.2), row(COMPILED, 9, 8.9), row(FLOAT, 6, 6), row(INT8, 2, 2.4)
    ).conclusion()
    assert text == (
        "Weights by ternary run as fast as the float twin in torch eager, torch compiled and "
        "ONNX fp32 (no kernel here skips multiplications). Eight bits are faster: ONNX int8 is "
        "3.0x the float twin in ONNX fp32; the twin's own int8 2.5x."
    )


def test_difference_within_the_noise_is_none() -> None:
    assert "as fast as" in found(row(EAGER, 10, 13, noise=0.4)).conclusion()
    assert "faster than the float twin: 1.3x in torch eager" in (
        found(row(EAGER, 10, 13)).conclusion()
    )


def test_fewer_multiplications_and_slower_runtimes_are_named() -> None:
    text = found(row(EAGER, 5, 10), row(FLOAT, 8, 4), row(INT8, 4, 4), macs=25).conclusion()
    assert text == (
        "Weights by ternary run faster than the float twin, with 25% of its multiplications: 2.0x "
        "in torch eager; slower than the float twin: 0.5x in ONNX fp32. Eight bits bring no speed "
        "here: ONNX int8 is 1.0x the float twin."
    )


def test_float_model_has_no_twin() -> None:
    rows = [Row(cell(FLOAT, 6), None), Row(cell(INT8, 2), None)]
    measured = found(*rows, twin_macs=None)
    assert measured.rows[0].faster is None
    assert measured.conclusion() == "Eight bits are faster: ONNX int8 is 3.0x itself in ONNX fp32."


def test_table_fits_eighty_columns() -> None:
    wide = [Row(cell(runtime, 12345.6, threads=16), cell(runtime, 12345.6)) for runtime in RUNTIMES]
    console = Console(width=80, record=True)
    console.print(benchmark_table(found(*wide)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
