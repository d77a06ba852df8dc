"""Write the result table of the README from run records; nothing in it is typed by hand.

    python docs/write_results.py runs     # takes the newest finished run of each experiment there

The records are kept in docs/results.json; run without arguments, the table is made of them anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline.experiments import catalog

RECORDS = Path(__file__).with_name("results.json")
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


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


def with_table(readme: str, records: dict[str, dict[str, Any]]) -> str:
    """The text with the table between its two marks replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(records)}\n{END}{after}"


def main(arguments: list[str]) -> None:
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    for folder in arguments:
        records |= collect(Path(folder))
    RECORDS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    README.write_text(with_table(README.read_text(), records))


if __name__ == "__main__":
    main(sys.argv[1:])
