"""StreamingLLM: the first and the last tokens, independent of the query."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from topkbench.methods.base import Geometry, Index, Policy, PrefillInputs, Selection, kv_bytes
from topkbench.methods.eviction import Evicting


@dataclass(kw_only=True)
class StreamingIndex(Index):
    """Each row's bounds, and the shape of the selection.

    Attributes:
        num_kv_heads: KV heads of the layer.
        device: Device of the selection.
    """

    num_kv_heads: int
    device: torch.device


@dataclass(kw_only=True)
class StreamingLLM(Evicting):
    """Keep the ``num_sink`` first tokens and the ``k - num_sink`` last ones.

    Source:
        StreamingLLM (arXiv:2309.17453), section 3. Here tokens keep their original positions; the
        paper rotates keys by their position in the rolling cache.

    Compared with the authors' code:
        ``streaming_llm/kv_cache.py`` (mit-han-lab/streaming-llm): keeps the same tokens when run on
        the same states. Difference: tokens keep their positions, which
        ``pos_shift/modify_llama.py`` renumbers.
    """

    name: ClassVar[str] = "streaming_llm"

    def build_index(self, prefill: PrefillInputs) -> StreamingIndex:
        keys = prefill.key_states
        counts = Index.counts(prefill)
        return StreamingIndex(num_kv_heads=keys.shape[1], device=keys.device, **counts)

    def append(self, index: StreamingIndex, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def encode(self, query_states: Tensor, index: StreamingIndex) -> int:
        """Return the batch size, all that the selection needs of the queries."""
        return len(query_states)

    def score(self, encoded: int, index: StreamingIndex) -> None:
        return None

    def select(
        self, scores: Tensor | None, encoded: int, index: StreamingIndex, policy: Policy
    ) -> Selection:
        kept = min(policy.k, index.length)
        num_sink = min(policy.num_sink, kept)
        start, end = index.row_bounds(encoded, index.device)
        valid = (end - start)[:, None]
        entries = torch.arange(kept, dtype=torch.int32, device=index.device)
        # Positions from the row's first token: 0, 1, ... num_sink - 1, then the last ones.
        recent = valid - kept + entries
        positions = torch.where((entries < num_sink) | (valid <= kept), entries, recent)
        slots = torch.where(positions < valid, positions + start[:, None], -1).to(torch.int32)
        heads = slots[:, None].expand(-1, index.num_kv_heads, -1)
        return Selection(heads.contiguous())

    def bytes_read_per_step(self, geometry: Geometry, n: int, k: int) -> int:
        return kv_bytes(geometry, min(k, n)) + self.moved_bytes(geometry, n, k)
