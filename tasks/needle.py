"""One needle in a haystack, over a grid of context lengths and needle depths."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from topkbench.methods.base import check_list
from topkbench.models.load import LoadedModel
from topkbench.tasks.generated import Drawn
from topkbench.tasks.ruler_words import RulerWords
from topkbench.tasks.ruler_words_prompts import needle_prompt
from topkbench.tasks.words import word_pools


@dataclass(kw_only=True)
class Needle(RulerWords):
    """niah_single with the needle at a given depth: one row per length and depth, and their mean.

    Source: HATA's Figure 6 (arXiv:2506.02572) has 15 lengths and 10 depths with one sample each, in
    a haystack of books; here the haystack is random words, as in ``task=ruler_words``, and there
    are several samples.

    Attributes:
        lengths: Tokens of prompt and answer together.
        depths: Percentage of the haystack that precedes the needle, 0 to 100.
    """

    name: str = "needle"
    lengths: Sequence[int] = (1024, 2048, 4096)
    depths: Sequence[int] = (0, 25, 50, 75, 100)
    _longest: ClassVar[str] = "task.lengths"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_list("task.lengths", self.lengths, least=1)
        check_list("task.depths", self.depths, least=0)
        if max(self.depths) > 100:
            raise ValueError(f"task.depths must be at most 100 percent, got {max(self.depths)}.")
        self.length = max(self.lengths)

    @property
    def shortest(self) -> int:
        return min(self.lengths)

    def draw(self, loaded: LoadedModel) -> Drawn:
        samples = []
        for length in self.lengths:
            for depth in self.depths:
                write = functools.partial(needle_prompt, words=word_pools()[0], depth=depth / 100)
                name = f"{length} x {depth}%"
                for index in range(self.num_samples):
                    samples.append(self.make(loaded, name, length, index, write))
        return Drawn(samples)

    def content(self, loaded: LoadedModel) -> dict[str, Any]:
        return super().content(loaded) | {"needle": [list(self.lengths), list(self.depths)]}
