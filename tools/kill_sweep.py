"""Kill a sweep again and again, and check that its rows are those of an undisturbed one.

python tools/kill_sweep.py --kills 50 method=exact,h2o k=16,32 task.length=512 num_samples=4
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMPARED = (
    *("status", "method", "k", "rbit", "score", "delta_full", "num_samples", "prompts_per_batch"),
    *("density", "bytes_read_per_step", "recall_at_k", "attention_mass", "output_rel_error"),
)
"""Columns that depend neither on times nor on how often the sweep was killed."""


def command(results: Path, settings: Sequence[str]) -> list[str]:
    """Return the command line of a sweep with its own folder of results."""
    own = ["tracker=none", f"results_dir={results}", "-m"]
    return [sys.executable, str(ROOT / "run.py"), *settings, *own]


def rows(results: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the compared columns of all rows, by cell and sub-task."""
    return {
        (path.parent.name, row["subtask"]): {name: row.get(name) for name in COMPARED}
        for path in sorted(results.glob("cells/*/rows.json"))
        for row in json.loads(path.read_text())["rows"]
    }


def measured(results: Path) -> tuple[int, int]:
    """Return how many batches of parts are on disk in journals, and how many of them twice."""
    lines: dict[tuple[str, int], int] = {}
    for path in results.glob("parts/*/*.jsonl"):
        for line in path.read_bytes().split(b"\n"):
            try:
                place = (path.parent.name, json.loads(line)["batch"])
            except ValueError:  # cut off by a kill
                continue
            lines[place] = lines.get(place, 0) + 1
    return len(lines), sum(count > 1 for count in lines.values())


def main() -> int:
    """Run the sweep undisturbed, then with kills; return 0 if the rows are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="how often to kill the sweep")
    parser.add_argument("--out", type=Path, default=Path("killed"), help="folder for the results")
    parser.add_argument("settings", nargs="+", help="the sweep's settings")
    options = parser.parse_args()
    undisturbed, disturbed = options.out / "undisturbed", options.out / "disturbed"
    began = time.monotonic()
    subprocess.run(command(undisturbed, options.settings), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    wanted, moments, kills = rows(undisturbed), random.Random(0), 0
    while kills < options.kills:
        process = subprocess.Popen(
            command(disturbed, options.settings),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(moments.uniform(0.2, 0.8) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            on_disk, twice = measured(disturbed)
            cells = len(list(disturbed.glob("cells/*/rows.json")))
            print(f"kill {kills}: {on_disk} batches in journals, {cells} cells", flush=True)
            if twice:
                print(f"{twice} batches were measured twice")
                return 1
            continue
        if rows(disturbed) != wanted:
            print("the rows differ")
            return 1
        print("ended with equal rows; begins anew", flush=True)
        shutil.rmtree(disturbed)
    subprocess.run(command(disturbed, options.settings), check=True, stdout=subprocess.DEVNULL)
    is_equal = rows(disturbed) == wanted
    print(f"{kills} kills, {len(wanted)} rows: {'equal' if is_equal else 'different'}")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
