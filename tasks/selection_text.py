"""The quality of a method's selections while a text is decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from topkbench.harness.decoding import Prompt
from topkbench.harness.task import Context
from topkbench.tasks.perplexity import Perplexity
from topkbench.tasks.selection import Selection


@dataclass(kw_only=True)
class TextSelection(Selection, Perplexity):
    """Selections on windows of text, of which the last ``scored_tokens + 1`` tokens are decoded.

    The windows are those of ``task=perplexity`` with the same settings, but for their number.
    """

    name: str = "selection_text"
    windows: int = 4
    scored_tokens: int = 64
    batch_size: int | Literal["auto"] = 1

    def shared_columns(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        return {"length": prompts[0].num_tokens}

    def answer(self, context: Context, prompt: Prompt) -> Sequence[int]:
        return ()
