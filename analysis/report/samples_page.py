"""The samples of a report's page: as much of them as one file can hold, as plain data."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from topkbench.analysis.comparison.configurations import Comparison
from topkbench.analysis.console import visible
from topkbench.analysis.report.samples import Answer, Prompt, in_one_line, prompts

MOST_BYTES = 2_000_000
"""Bytes of prompts and answers that a page holds, and"""
MOST_KEPT_BYTES = 1_000_000
"""of the tokens that heads kept. How many are left out is said on the page."""


def page(compared: Comparison, samples: pd.DataFrame, kept: pd.DataFrame) -> dict[str, Any] | None:
    """Return what ``samples.html`` shows; None if no answer was recorded.

    Args:
        compared: The configurations.
        samples: What `build.load` returned.
        kept: What `samples.load_kept` returned.

    Returns:
        ``data`` for the page's script, ``words`` (sentences that say what is left out).
    """
    every = prompts(compared, samples)
    if not every:
        return None
    names = list(dict.fromkeys(one.name for prompt in every for one in prompt.answers))
    methods = {one.name: one.method for prompt in every for one in prompt.answers}
    number = {name: place for place, name in enumerate(names)}
    shown = _that_fit(every, number)
    tokens = _Kept(kept)
    entries = []
    for prompt in shown:
        found = tokens.of(prompt, number)
        entries.append({**_entry(prompt, number), **({} if found is None else {"kept": found})})
    words = []
    if len(shown) < len(every):
        words.append(
            f"{len(shown):,} of {len(every):,} prompts are in this page, those on which a method"
            " and full attention differ first; `topkbench samples RESULTS` shows all."
        )
    if tokens.left_out:
        plural = "" if tokens.left_out == 1 else "s"
        words.append(
            f"Which tokens the heads kept is left out for {tokens.left_out} prompt{plural}, as it"
            " would make this page too large; kept.parquet has it."
        )
    data = {
        "configurations": [{"name": name, "method": methods[name]} for name in names],
        "prompts": entries,
        "keptRecorded": len(kept) > 0,
    }
    return {"data": data, "words": words}


def _entry(prompt: Prompt, number: dict[str, int]) -> dict[str, Any]:
    """Return a prompt as the script reads it; parts are null where the answer is full's."""
    full = prompt.full
    return {
        "setting": prompt.setting,
        "seed": prompt.seed,
        "subtask": prompt.subtask,
        "id": prompt.sample_id,
        "question": prompt.question,
        "references": prompt.references,
        "full": None if full is None else {"score": full.score, "text": full.text},
        "answers": [
            {
                "of": number[one.name],
                "score": one.score,
                "parts": None if prompt.is_same(one) else _parts(one),
            }
            for one in prompt.answers
        ],
    }


def _parts(answer: Answer) -> list[tuple[str, str]]:
    """Return the pieces of an answer, none of an empty one; one if full's is not known."""
    return list(answer.parts) or ([("same", answer.text)] if answer.text else [])


def _that_fit(every: Sequence[Prompt], number: dict[str, int]) -> list[Prompt]:
    """Return the prompts that a page holds, taken from settings and sub-tasks in turn."""
    queues: dict[tuple[str, str], collections.deque[int]] = {}
    order = sorted(
        range(len(every)),
        key=lambda place: (
            not any(every[place].is_lost(one) for one in every[place].answers),
            not every[place].differs,
        ),
    )
    for place in order:
        one = every[place]
        queues.setdefault((one.setting, one.subtask), collections.deque()).append(place)
    left, chosen = MOST_BYTES, set[int]()
    while queues:
        for key in list(queues):
            place = queues[key].popleft()
            size = len(json.dumps(_entry(every[place], number))) + len(", ")
            if size <= left:  # else a smaller one may still fit
                left -= size
                chosen.add(place)
            if not queues[key]:
                del queues[key]
    return [every[one] for one in sorted(chosen)]


class _Kept:
    """The tokens that heads kept, as long as they fit in the page.

    Args:
        kept: A row for each cell and prompt.
    """

    def __init__(self, kept: pd.DataFrame) -> None:
        self.left_out = 0
        self._left = MOST_KEPT_BYTES
        self._rows = {
            (one["run_id"], in_one_line(one["subtask"]), in_one_line(one["sample_id"])): one
            for one in kept.to_dict("records")
        }

    def of(self, prompt: Prompt, number: dict[str, int]) -> dict[str, Any] | None:
        """Return the tokens of a prompt and what each configuration kept of them.

        Returns:
            None where it was not recorded; ``{"leftOut": True}`` where it does not fit.
        """
        rows = {
            number[one.name]: row
            for one in prompt.answers
            if (row := self._rows.get((one.run_id, prompt.subtask, prompt.sample_id))) is not None
        }
        if not rows:
            return None
        first = next(iter(rows.values()))
        found = {
            "texts": [visible(text) for text in json.loads(first["texts"])],
            "cells": [
                {
                    "of": place,
                    "layers": list(row["layers"]),
                    "heads": list(row["heads"]),
                    "cached": int(row["cached"]),
                    "kept": row["kept"],
                }
                for place, row in rows.items()
                if row["texts"] == first["texts"]  # else it was at another step
            ],
        }
        self._left -= len(json.dumps(found))
        if self._left < 0:
            self.left_out += 1
            return {"leftOut": True}
        return found
