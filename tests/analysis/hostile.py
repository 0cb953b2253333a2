"""Texts that would do harm where they are taken for more than texts, and sweeps full of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from topkbench.analysis.record.kept_file import packed
from topkbench.analysis.record.store import Row, Status, Sweep, identity

SCRIPT = "<script>window.harmed = 1</script><img src=x onerror=window.harmed=1>"
END = "</script><script>window.harmed = 1</script>"
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m red \x00\x08"
FORMULA = "=cmd|' /C calc'!A0"
RIGHT_TO_LEFT = "\u202egpj.exe\u2066\u200f\u061c"
MARKDOWN = "a|b\n# head\n```\n[x](javascript:1) ![y](http://z) **b** <b>&lt;\u2028"
LONG = "long " * 20_000
TEXTS = (SCRIPT, END, ESCAPES, FORMULA, RIGHT_TO_LEFT, MARKDOWN, LONG)


def sweep_of(
    folder: Path,
    answers: Mapping[str, Sequence[tuple[float, str]]],
    question: str = "Which?",
    name: str = "first",
    subtasks: Sequence[str] = ("vt",),
    sample_id: str = "vt",
    **columns: Any,
) -> Sweep:
    """Return a sweep with the answers of some methods, a list of (score, text) each.

    Args:
        folder: Where its results are.
        answers: The answers, in order of prompts, by method.
        question: The question of all prompts, and one of their references.
        name: Name of the sweep's folder.
        subtasks: The prompts' sub-tasks in turn.
        sample_id: The prompts' names, which their numbers follow; the first is ``sample_id``-0.
        columns: Columns of all rows.
    """
    sweep = Sweep(folder / "results" / "default" / name, folder / "results")
    for method, given in answers.items():
        is_full = method == "full"
        known: dict[str, Any] = {
            **{"status": Status.OK, "model": "tiny", "task": "ruler", "length": 4096, "seed": 0},
            **{"question": "sparse", "device": "AMD EPYC, 2 cores"},
            **({} if is_full else {"k": 64, "protocol": "unified"}),
        }
        samples = [
            {
                **{"sample_id": f"{sample_id}-{place}", "subtask": subtasks[place % len(subtasks)]},
                **{"length": 4096, "score": score, "prediction": text},
                **{"references": ["right", question], "question_text": question},
            }
            for place, (score, text) in enumerate(given)
        ]
        own = Row(
            run_id=identity({"method": method, "folder": name}),
            subtask="mean",
            method=method,
            score=sum(score for score, _ in given) / len(given),
            num_samples=len(given),
            **{**known, **columns},
        )
        slots = np.eye(4, 6, dtype=bool) | (np.arange(6) == 5)
        kept = {
            **{
                "sample_id": f"{sample_id}-0",
                "subtask": subtasks[0],
                "cached": 6,
                "layers": [1, 3],
            },
            **{"heads": [2, 2], "kept": packed(slots)},
            "texts": json.dumps(["<b>", " one", " two", RIGHT_TO_LEFT, END, " six"]),
        }
        sweep.store.cell(own.run_id).write([own], samples, {}, "", [] if is_full else [kept])
        sweep.append(own.run_id)
    return sweep
