"""Write the result tables of the README from records; nothing in them is typed by hand.

    python docs/write_results.py runs     # takes the newest finished run of each experiment there

The records are kept in docs/results.json; run without arguments, the tables are made of them anew.
How fast images are written and read is in docs/loading.json; tests/benchmarks/data_writing.py and
data_loading.py write it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.experiments import catalog

RECORDS = Path(__file__).with_name("results.json")
README = Path(__file__).parents[1] / "README.md"
LOADING = Path(__file__).with_name("loading.json")


def collect(runs: Path) -> dict[str, dict[str, Any]]:
    """The newest finished run of each curated experiment below a folder of runs.

    Left out are runs with other settings than the catalog's, and resumed ones, whose time is not
    that of the whole training.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(runs.glob("*/*/run.json")):
        run = json.loads(path.read_text())
        if run["status"] == "finished" and run["sessions"] == 1 and _is_curated(run["experiment"]):
            found[run["experiment"]["name"]] = run["result"]
    return found


def _is_curated(experiment: dict[str, Any]) -> bool:
    curated = catalog().get(experiment["name"])
    if curated is None:
        return False
    expected = curated.model_dump(mode="json")
    same = all(experiment[key] == expected[key] for key in ("dataset", "backbone", "method"))
    return (
        same
        and experiment["train"] == expected["train"]
        and experiment["data"]["synthetic"] is None
    )


def table(records: dict[str, dict[str, Any]]) -> str:
    """The records as a Markdown table, with the catalog's published figures beside them."""
    rows = [
        "| experiment | epochs | top-1 (%) | published (%) | parameters | stored bytes "
        "| smaller than float32 | seconds | on |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, run in sorted(records.items()):
        reference = catalog()[name].reference
        published = f"{reference.top1:.2f}" if reference and reference.top1 else "-"
        ratio = run["float32_bytes"] / run["stored_bytes"]
        rows.append(
            f"| `{name}` | {run['epochs']} | {run['top1']:.2f} | {published} "
            f"| {run['parameters']:,} | {run['stored_bytes']:,} | {ratio:.1f}x "
            f"| {run['seconds']:.0f} | {run['hardware']} |"
        )
    return "\n".join(rows)


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


def with_table(readme: str, mark: str, content: str) -> str:
    """The text with what stands between the two marks of that name replaced."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def with_tables(readme: str) -> str:
    """The README with both tables made anew of the records."""
    readme = with_table(readme, "results", table(json.loads(RECORDS.read_text())))
    return with_table(readme, "loading", loading_table(json.loads(LOADING.read_text())))


def main(arguments: list[str]) -> None:
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    for folder in arguments:
        records |= collect(Path(folder))
    RECORDS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    README.write_text(with_tables(README.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
