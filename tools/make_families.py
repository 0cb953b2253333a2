"""Write ``docs/families.md``, the models that are served: python tools/make_families.py.

It is made from the list that the tests go through, ``tests/models/families.py``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # lets the script run without installing the package, as run.py does
    sys.path[0] = str(ROOT / ".types")

from topkbench.tests.models.families import OWN_CACHE, OWN_STATES, REFUSED, SERVED  # noqa: E402

PAGE = ROOT / "docs" / "families.md"

HEAD = """# Families of models

Any model that transformers loads as a causal language model is decoded with topkbench's own cache
and attention, if its layers are of the kinds below. The tables are generated from the list that the
tests go through (`tests/models/families.py`) by `python tools/make_families.py`; edit that list,
not this page.

Of each family a tiny model of random weights is held against transformers: with every token
selected it generates what transformers' `generate` gives with its own attention, token for token in
float32, one prompt or three padded ones; decoded with topkbench's cache its logits are those of one
forward without a cache; and with a few tokens selected the method acts in every layer left to it.
Before a model's first cell, the model itself decodes a few tokens after two prompts of 48 and 31
tokens, twice: the logits must be those of transformers' own forward. What is not served says why in
one sentence, and its rows have no numbers.

- **Layers with a sliding window or chunks** stay dense, since they read few tokens. The bytes and
  the density of a step count what they read. The cache keeps all their tokens.
- **Layers without attention** (state-space models, linear attention, short convolutions) run as
  they are. Their states are kept with each prompt, so that every cell begins with them. Since every
  token changes them, a question's tokens are decoded one by one. A step's bytes are those of keys,
  values and index; these states, which every method reads alike, are left out.
- **Attention that changes with the sequence's length** (`longrope` of Phi-3 and Phi-4-mini,
  `dynamic`, Llama 4's temperature): a prompt and its answer must lie on one side of the length at
  which it changes; with the last two, below it.
- **Learned sinks, capped and scaled logits, biases, norms and partial rotary positions** act in
  the attention to the selected tokens as in the model's own.
- **Latent attention** (MLA) is used as transformers expands it: bytes are those of expanded keys
  and values, which a serving system would not store.
- **Mixtures of experts** pass through. In bfloat16 a token near a tie may go to other experts in a
  decode step than in a prefill.
- **InfiniGen** speculates a layer's queries from the previous layer's input. It needs the previous
  layer's attention and queries that are made as Llama's; elsewhere it is refused.

`protocol.dense_layers` and every other number of a layer counts all layers of the model, those
without attention included.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page's text."""
    served = [
        (f"`{one.name}`", one.models, one.layers or "–", "yes" if one.speculates else "–")
        for one in SERVED
    ]
    refused = [
        (f"`{one.family.name}`", one.family.models, one.family.layers)
        for one in (*REFUSED, OWN_CACHE, OWN_STATES)
    ]
    return "\n".join(
        [
            HEAD,
            f"## Served: {len({one.name for one in SERVED})} families\n",
            *_table(("Family", "Models", "Besides Llama's attention", "InfiniGen"), served),
            "\n## Not served\n",
            *_table(("Family", "Models", "Why"), refused),
            "",
        ]
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
