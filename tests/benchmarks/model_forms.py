"""What becomes of a trained network in each of its forms: bytes on disk, accuracy, latency.

For each finished run below a folder: the network as it was trained, folded, packed and read back,
and exported to ONNX in float32 and in int8. Accuracy is that of all test images, through each form.
Latency is that of one image on one thread, in turns with the float twin, the same network without
the method. Writes docs/forms.json, of which `python -m docs.write_results` makes the README's
table.

    PYTHONPATH=. python tests/benchmarks/model_forms.py runs
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from data_prep import Loader, Manifest
from models.exporting import open_exported
from pipeline import inputs
from pipeline.checkpoints.storage import storage_of
from pipeline.checkpoints.store import CheckpointStore, kept_epoch
from pipeline.config import Experiment
from pipeline.display import Display
from pipeline.loop import build_model
from pipeline.materials import find_data, prepare
from pipeline.preprocessing import Preprocessing
from pipeline.registry.artifact import portable_yaml
from pipeline.settings import build_experiment
from pipeline.use.benchmark import benchmark
from pipeline.use.model import open_model
from pipeline.use.speed import EAGER, FLOAT, INT8

FORMS = Path(__file__).parents[2] / "docs" / "forms.json"
CALIBRATION = 1024  # training images
RUNTIMES = {"torch": EAGER, "onnx": FLOAT, "int8": INT8}

Logits = Callable[[Tensor], Tensor]
Batches = list[tuple[Tensor, Tensor]]


def trained_network(run: Path, experiment: Experiment, manifest: Manifest) -> nn.Module:
    """The network with the weights that the run has as its result."""
    identity = json.loads((run / "run.json").read_text())["identity"]
    store = CheckpointStore(storage_of(experiment, run), identity)
    newest = store.newest(print)
    if newest is None:
        raise SystemExit(f"{run} has no checkpoint")
    model = build_model(experiment, manifest)
    store.load_model(kept_epoch(store.history(newest)), model)
    return model.eval()


def batches(loader: Loader, images: int | None = None) -> Batches:
    """Batches of an epoch until there are so many images; all without a number."""
    taken: Batches = []
    with loader.epoch(0) as epoch:
        for pixels, labels in epoch:
            taken.append((pixels.clone(), labels.clone()))
            if images is not None and sum(len(batch) for _, batch in taken) >= images:
                break
    return taken


@torch.inference_mode()
def accuracy(logits: Logits, test: Batches) -> float:
    """Percent of the images whose largest logit is that of their class."""
    hits = sum(int((logits(pixels).argmax(1) == labels).sum()) for pixels, labels in test)
    return 100 * hits / sum(len(labels) for _, labels in test)


def latency(packed: Path, display: Display) -> dict[str, float]:
    """Milliseconds for an image on one thread, by runtime, of the network and of its twin."""
    found = benchmark(
        open_model(str(packed)), display, batches=(1,), runtimes=tuple(RUNTIMES.values())
    )
    names = {runtime: name for name, runtime in RUNTIMES.items()}
    milliseconds = {}
    for row in found.rows:
        if row.model.device == "cpu" and row.model.threads == 1:
            name = names[row.model.runtime]
            milliseconds[name] = round(row.model.median_ms, 4)
            # A float network is its own twin.
            milliseconds[f"twin_{name}"] = round((row.twin or row.model).median_ms, 4)
    return milliseconds


def measure(run: Path, experiment: Experiment, scratch: Path, display: Display) -> dict[str, Any]:
    """All figures of one run."""
    manifest = prepare(experiment, find_data(experiment), display)
    test = batches(inputs.make_loader(experiment, manifest, "test", training=False))
    calibration = batches(
        inputs.make_loader(experiment, manifest, "train", training=False), CALIBRATION
    )
    preprocessing = Preprocessing.of(experiment, manifest)
    trained = trained_network(run, experiment, manifest)
    file = {name: scratch / f"{name}.onnx" for name in ("onnx", "int8")}
    file["packed"] = scratch / "packed.safetensors"
    packed = models.pack(
        trained,
        file["packed"],
        metadata={
            "experiment_yaml": portable_yaml(experiment),
            "preprocessing": preprocessing.to_dict(),
        },
    )
    shape = preprocessing.input_shape
    images = test[0][0]
    models.export(trained, file["onnx"], "onnx", image_shape=shape, images=images)
    seen = [pixels for pixels, _ in calibration]
    models.export(
        trained, file["int8"], "onnx-int8", image_shape=shape, images=images, calibration=seen
    )
    forms: dict[str, Logits] = {
        "trained": trained,
        "folded": models.fold(trained).eval(),
        "packed": models.unpack(file["packed"]),
        "onnx": open_exported(file["onnx"], "onnx"),
        "int8": open_exported(file["int8"], "onnx-int8"),
    }
    return {
        "epochs": experiment.train.epochs,
        "train_images": manifest.counts["train"],
        "test_images": manifest.counts["test"],
        "bytes": {name: path.stat().st_size for name, path in file.items()},
        "tensor_bytes": packed.tensor_bytes,
        "top1": {name: round(accuracy(logits, test), 3) for name, logits in forms.items()},
        "milliseconds": latency(file["packed"], display),
    }


def finished_runs(folder: Path) -> Iterator[tuple[Path, Experiment]]:
    """Each finished run below a folder, the oldest first."""
    for record in sorted(folder.glob("*/*/run.json"), key=lambda path: path.parent.name):
        run = json.loads(record.read_text())
        if run["status"] == "finished":
            yield record.parent, build_experiment(run["experiment"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of all runs")
    folder = parser.parse_args().runs
    forms = json.loads(FORMS.read_text()) if FORMS.exists() else {}
    with Display() as display:
        for run, experiment in finished_runs(folder):
            with tempfile.TemporaryDirectory(prefix="ternforge-") as scratch:
                forms[experiment.name] = measure(run, experiment, Path(scratch), display)
            display.stage("measured", f"{experiment.name} {json.dumps(forms[experiment.name])}")
            FORMS.write_text(json.dumps(forms, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
