"""Write the result tables of the README from records; nothing in them is typed by hand.

    python -m docs.write_results runs     # looks at all the runs there, of which it takes the best

The records are kept in docs; without arguments, the tables are made of them anew:

- results.json: finished runs of experiments as cataloged, by name;
- curves.json: accuracy by epoch, also of shortened and unfinished runs; `docs/draw_curves.py` draws
  pictures of it;
- loading.json and training.json: how fast images are read and networks are trained, written by
  tests/benchmarks/data_writing.py, data_loading.py, and training_throughput.py;
- forms.json: size, accuracy and latency of trained networks in each of their forms, written by
  tests/benchmarks/model_forms.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
from data_prep import get_dataset
from pipeline.experiments import catalog
from pipeline.inputs import image_size
from pipeline.loop import build_model

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
RECORDS, CURVES = DOCS / "results.json", DOCS / "curves.json"
LOADING, TRAINING, FORMS = (DOCS / f"{name}.json" for name in ("loading", "training", "forms"))

#: Settings of a recipe that say how it is computed, which a run is free to choose.
_COMPUTED = {"precision", "compile", "accumulation"}

#: Settings that are shortened together.
_DURATIONS = {"epochs", "warmup_epochs", "milestones", "growth_epochs"}

#: Forms of a network in the order of the table, and what runs it.
_FORMS = ("trained", "folded", "packed", "onnx", "int8")
_RUNTIMES = ("torch", "twin_torch", "onnx", "twin_onnx", "int8")

Record = dict[str, Any]


def runs_below(folder: Path) -> Iterator[tuple[Path, Record]]:
    """Folder and record of each run of one seed, the oldest of each experiment first."""
    for path in sorted(folder.glob("*/*/run.json")):
        run = json.loads(path.read_text())
        if run["experiment"].get("seeds", 1) == 1:
            yield path.parent, run


def collect(runs: Path) -> dict[str, Record]:
    """The result of the newest finished run of each curated experiment below a folder of runs.

    Left out are runs with other settings than the catalog's, and resumed ones, whose time is not
    that of the whole training.
    """
    return {
        run["experiment"]["name"]: run["result"]
        for _, run in runs_below(runs)
        if run["status"] == "finished"
        and run["sessions"] == 1
        and _is_curated(run["experiment"], _COMPUTED)
    }


def with_sizes(records: dict[str, Record]) -> dict[str, Record]:
    """The records with the sizes of today's formats, which follow from the network alone."""
    sized = {}
    for name, run in records.items():
        experiment = catalog()[name]
        dataset = get_dataset(experiment.dataset)
        network = build_model(experiment, dataset)
        profile = models.profile(network, image_size(experiment.train, dataset))
        sizes = {"stored_bytes": profile.stored_bytes, "float32_bytes": profile.float32_bytes}
        sized[name] = run | sizes
    return sized


def collect_curves(runs: Path) -> dict[str, Record]:
    """Accuracy by epoch of the longest run of each curated experiment; of several, the newest's.

    A run may be shorter than the catalog says, or not have finished.
    """
    curves: dict[str, Record] = {}
    for folder, run in runs_below(runs):
        name = run["experiment"]["name"]
        history = _history(folder)
        if not history or not _is_curated(run["experiment"], _COMPUTED | _DURATIONS):
            continue
        # Accuracy is watched on held-out images, where the recipe holds any out.
        watched = "test" if "test_top1" in history[0] else "validation"
        curve = [round(epoch[f"{watched}_top1"], 3) for epoch in history]
        if len(curve) >= len(curves[name]["top1_by_epoch"] if name in curves else []):
            finished = run["status"] == "finished"
            curves[name] = {
                "epochs": run["experiment"]["train"]["epochs"],
                "precision": run["experiment"]["train"]["precision"],
                "test_top1": run["result"]["top1"] if finished else None,
                "watched": watched,
                "top1_by_epoch": curve,
            }
    return curves


def _history(run: Path) -> list[dict[str, float]]:
    """Metrics of each epoch, from the newest checkpoint; empty without one."""
    states = sorted(run.glob("checkpoints/epoch-*/state.json"))
    return json.loads(states[-1].read_text())["history"] if states else []


def _is_curated(experiment: Record, free: set[str]) -> bool:
    """Whether an experiment is the catalog's but for these settings of its recipe."""
    curated = catalog().get(experiment["name"])
    if curated is None or experiment["data"]["synthetic"] is not None:
        return False
    expected = curated.model_dump(mode="json")
    train = {key: value for key, value in expected["train"].items() if key not in free}
    keys = ("dataset", "backbone", "method", "init_from")
    return all(experiment[key] == expected[key] for key in keys) and train == {
        key: value for key, value in experiment["train"].items() if key not in free
    }


def table(records: dict[str, Record]) -> str:
    """The records as a Markdown table, with the catalog's published figures beside them."""
    rows = [
        "| experiment | epochs | top-1 (%) | published (%) | parameters | stored bytes "
        "| smaller than float32 | seconds | on |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, run in sorted(records.items()):
        ratio = run["float32_bytes"] / run["stored_bytes"]
        precision = run.get("precision", "float32")
        where = run["hardware"] + (f", {precision}" if precision != "float32" else "")
        rows.append(
            f"| `{name}` | {run['epochs']} | {run['top1']:.2f} | {_published(name)} "
            f"| {run['parameters']:,} | {run['stored_bytes']:,} | {ratio:.1f}x "
            f"| {run['seconds']:.0f} | {where} |"
        )
    return "\n".join(rows)


def _published(name: str) -> str:
    reference = catalog()[name].reference
    return f"{reference.top1:.2f}" if reference and reference.top1 else "-"


def published_table(curves: dict[str, Record]) -> str:
    """Runs of experiments with a published figure beside it, each with the best of its epochs."""
    rows = [
        "| experiment | data set | epochs | top-1 (%) | best epoch (%) | published (%) "
        "| which is |",
        "|---|---|---|---:|---|---:|---|",
    ]
    for name, run in sorted(curves.items()):
        curated = catalog()[name]
        if curated.reference is None or curated.reference.top1 is None:
            continue
        curve = run["top1_by_epoch"]
        best = max(curve)
        held_out = ", held-out images" if run["watched"] == "validation" else ""
        top1 = "-" if run["test_top1"] is None else f"{run['test_top1']:.2f}"
        rows.append(
            f"| `{name}` | {curated.dataset} | {_epochs(run, curated.train.epochs)} | {top1} "
            f"| {best:.2f} at {1 + curve.index(best)}{held_out} | {curated.reference.top1:.2f} "
            f"| {curated.reference.text}; {curated.reference.source} |"
        )
    return "\n".join(rows)


def _epochs(run: Record, cataloged: int) -> str:
    """Epochs done, of how many planned, where the paper took how many."""
    done, planned = len(run["top1_by_epoch"]), run["epochs"]
    text = f"{done}" if done == planned else f"{done} of {planned}"
    return text if planned == cataloged else f"{text}, the paper's {cataloged} shortened"


def loading_table(races: dict[str, dict[str, float]]) -> str:
    """Images per second of each contestant of each race, and how much slower than the first."""
    rows = ["| what | by | images/s | the first is |", "|---|---|---:|---:|"]
    for title, speeds in races.items():
        if "first" in speeds:
            continue
        first = next(iter(speeds.values()))
        for name, speed in speeds.items():
            rows.append(f"| {title} | {name} | {speed:,.0f} | {first / speed:.2f}x |")
            title = ""
    rows += ["", "| from the start of a process to its first batch | first | later |"]
    rows.append("|---|---:|---:|")
    for title, times in races.items():
        if "first" in times:
            name = title.removeprefix("cold start of ")
            rows.append(f"| {name} | {times['first']:.1f} s | {times['second']:.1f} s |")
    return "\n".join(rows)


def training_table(races: dict[str, Record]) -> str:
    """Speed, memory and parts of the training of each network; then several workers."""
    rows = [
        "| on | network | method | images/s | of a bare loop | memory (GB) | data | forward "
        "| backward | optimizer | report | other |",
        "|---|---|---|" + 9 * "---:|",
    ]
    for title, race in races.items():
        for run in race["networks"]:
            parts = " | ".join(f"{100 * share:.1f} %" for share in run["parts"].values())
            rows.append(
                f"| {title} | `{run['network']}` | {run['method']} | {run['stack']:,.0f} "
                f"| {run['stack'] / run['bare']:.3f} | {run['stack_bytes'] / 1e9:.1f} | {parts} |"
            )
            title = ""
    rows += ["", "| on | workers | images/s | the first is |", "|---|---|---:|---:|"]
    for title, race in races.items():
        for name, speed in race["workers"].items():
            first = next(iter(race["workers"].values()))
            rows.append(f"| {title} | {name} | {speed:,.0f} | {first / speed:.2f}x |")
            title = ""
    return "\n".join(rows)


def forms_table(forms: dict[str, Record]) -> str:
    """Bytes and accuracy of each form of trained networks; then latency beside the float twin."""
    rows = [
        "| network | epochs of images | bytes, ONNX float32 | packed | ONNX int8 "
        "| top-1 (%), trained | folded | packed | ONNX | ONNX int8 |",
        "|---|" + 9 * "---:|",
    ]
    for name, form in sorted(forms.items()):
        size, top1 = form["bytes"], form["top1"]
        ratio = size["onnx"] / size["packed"]
        accuracies = " | ".join(f"{top1[key]:.2f}" for key in _FORMS)
        rows.append(
            f"| `{name}` | {form['epochs']} of {form['train_images']:,} | {size['onnx']:,} "
            f"| {size['packed']:,} ({ratio:.1f}x) | {size['int8']:,} | {accuracies} |"
        )
    rows += ["", "| network | torch (ms) | float twin | ONNX (ms) | float twin | ONNX int8 (ms) "]
    rows[-1] += "| int8 against the twin's ONNX |"
    rows.append("|---|" + 6 * "---:|")
    for name, form in sorted(forms.items()):
        times = form["milliseconds"]
        figures = " | ".join(f"{times[key]:.2f}" for key in _RUNTIMES)
        rows.append(f"| `{name}` | {figures} | {times['twin_onnx'] / times['int8']:.2f}x |")
    return "\n".join(rows)


def with_table(readme: str, mark: str, content: str) -> str:
    """The text with what stands between the two marks of that name replaced."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def with_tables(readme: str) -> str:
    """The README with its tables made anew of the records."""
    tables = {
        "results": table(_read(RECORDS)),
        "published": published_table(_read(CURVES)),
        "loading": loading_table(_read(LOADING)),
        "training": training_table(_read(TRAINING)),
        "forms": forms_table(_read(FORMS)),
    }
    for mark, content in tables.items():
        readme = with_table(readme, mark, content)
    return readme


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def curves_as_json(curves: dict[str, Record]) -> str:
    """A line for each run: its curve has hundreds of figures."""
    lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(curves.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: list[str]) -> None:
    records, curves = _read(RECORDS), _read(CURVES)
    for folder in arguments:
        records |= collect(Path(folder))
        for name, run in collect_curves(Path(folder)).items():
            known = curves.get(name, {"top1_by_epoch": []})
            if len(run["top1_by_epoch"]) >= len(known["top1_by_epoch"]):
                curves[name] = run
    records = with_sizes(records)
    RECORDS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    CURVES.write_text(curves_as_json(curves))
    README.write_text(with_tables(README.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
