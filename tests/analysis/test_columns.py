"""A column is declared once: adding one touches the row's file, and what computes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from topkbench.analysis.comparison.configurations import OVER_SEEDS, OVER_WINDOWS
from topkbench.analysis.comparison.counts import counted
from topkbench.analysis.comparison.metrics import CURVES
from topkbench.analysis.record.row import COLUMNS, DECLARED, MEASURED, PAIRED_COLUMNS, SPEED_COLUMNS

ROOT = Path(__file__).parents[2]
NEW = '''
    needles_kept: float | None = column(
        label="Needles kept",
        unit="of 100",
        better="higher",
        format=".1f",
        most=100.0,
        kind="result",
        pooled="mean",
        interval="seeds",
        head="Needles",
        measured_on="selection quality",
        tracked=True,
        curve=Curve("needles", "Needles kept", "Higher is better.", ("k",)),
    )
    """Needles of a prompt of which some token was selected, of 100."""

    bytes_read_per_step: '''
SCRIPT = """
import json, sys
from pathlib import Path
from topkbench.analysis.comparison.configurations import compare
from topkbench.analysis.record.row import RecordError, Row
from topkbench.analysis.record.store import frame
from topkbench.analysis.report.build import build
from topkbench.analysis.tables.overview import main_table
from topkbench.analysis.tracking.wandb_payload import curves, summary

common = dict(status="ok", model="m", task="t", subtask="mean", protocol="unified",
    judged_prompts=4)
rows = [
    Row(run_id=f"{k + seed:016x}", method="quest", k=k, seed=seed, needles_kept=k / 10 + seed,
        **common)
    for k in (64, 512) for seed in (0, 1)
]
try:
    rows[0].replace(status="failed", reason="why.")
    refused = ""
except RecordError as error:
    refused = str(error)
table = main_table(compare(frame(rows)).overall)
out = Path(sys.argv[1])
frame(rows).to_csv(out / "rows.csv", index=False)
build(out, out / "report")
print(json.dumps({
    "refused": refused,
    "table": dict(zip(table.head, table.rows[0])),
    "summary": summary(rows[:1]),
    "curves": curves(frame(rows), frame([]))[0],
    "figure": (out / "report" / "figures" / "needles_vs_k.csv").read_text().splitlines()[0],
    "markdown": (out / "report" / "report.md").read_text(),
}))
"""


def test_a_new_column_is_shown_everywhere_by_its_declaration_alone(tmp_path: Path) -> None:
    package = tmp_path / "code" / "topkbench"
    for folder in ("analysis", "conf"):
        ignored = shutil.ignore_patterns("measured", "__pycache__")
        shutil.copytree(ROOT / folder, package / folder, ignore=ignored)
    row = package / "analysis" / "record" / "row.py"
    text = row.read_text()
    assert text.count("\n    bytes_read_per_step: ") == 1
    row.write_text(text.replace("\n    bytes_read_per_step: ", NEW))
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={"PYTHONPATH": str(tmp_path / "code"), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert "must be empty unless status is ok, got needles_kept" in found["refused"]
    # Two seeds: Student's interval, 6.9 +- 12.706 * 0.7071 / 1.4142.
    assert found["table"]["Needles (of 100)"] == "6.9 [0.5, 13.3]"
    assert found["summary"]["needles_kept"] == 6.4
    assert found["curves"] == {"k": 64.0, "by_k/needles_kept/quest": 6.9}
    names = "needles_kept,needles_kept_ci_low,needles_kept_ci_high,judged_prompts"
    assert found["figure"].endswith(names)
    assert "![Needles kept against budget](figures/needles_vs_k.png)" in found["markdown"]


def test_what_is_derived_from_the_declarations() -> None:
    assert list(DECLARED) == list(COLUMNS)
    assert (
        *("recall_at_k", "recall_prompt", "recall_generated"),
        *("attention_mass", "output_rel_error"),
    ) == OVER_SEEDS
    assert OVER_WINDOWS == ("nll_delta", "kl_full")
    assert len(set(SPEED_COLUMNS)) == 25
    assert (
        *("score_ci_low", "score_ci_high", "delta_full", "delta_ci_low", "delta_ci_high"),
        *("turn_change", "turn_change_ci_low", "turn_change_ci_high"),
        *("generated_delta", "generated_delta_ci_low", "generated_delta_ci_high"),
        *("cut_off_delta", "cut_off_delta_ci_low", "cut_off_delta_ci_high"),
        *("nll_delta_ci_low", "nll_delta_ci_high", "kl_full_ci_low", "kl_full_ci_high"),
    ) == PAIRED_COLUMNS
    assert set(MEASURED) - {*SPEED_COLUMNS, *PAIRED_COLUMNS} == {
        *("score", "nll", "nll_delta", "kl_full", "top1_agreement"),
        *("generated_tokens", "cut_off_share", "recall_prompt", "recall_generated"),
        *("recall_at_k", "attention_mass", "output_rel_error"),
    }
    assert {name: one.over for name, one in CURVES.items()} == {
        "score": ("k", "rbit"),
        "nll_delta": ("k",),
        "kl_full": ("k",),
        "recall_at_k": ("k", "rbit"),
        "decode_vs_full": ("k", "rbit"),
    }
    assert counted("recall_at_k") == ("judged_prompts",)
    assert counted("decode_vs_full") == ("timed_prompts",)
    for name, one in DECLARED.items():
        shown = one.head or one.curve or one.better
        assert bool(one.label) or not shown, f"{name} is shown and must have a label"
