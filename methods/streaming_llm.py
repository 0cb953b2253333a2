"""StreamingLLM: the first and the last tokens, independent of the query."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from topkbench.methods.base import Geometry, Index, PrefillInputs, Selection, StepContext, kv_bytes
from topkbench.methods.eviction import Evicting


@dataclass(kw_only=True)
class StreamingLLM(Evicting[Index]):
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

    def build_index(self, prefill: PrefillInputs) -> Index:
        return Index.of(prefill)

    def append(self, index: Index, key_states: Tensor, value_states: Tensor) -> None:
        index.advance()

    def select(self, index: Index, context: StepContext) -> Selection:
        policy, device = context.policy, context.cache.device
        batch_size, num_kv_heads = context.query_states.shape[:2]
        kept = min(policy.k, index.length)
        num_sink = min(policy.num_sink, kept)
        start, end = index.row_bounds(batch_size, device)
        valid = (end - start)[:, None]
        entries = torch.arange(kept, dtype=torch.int32, device=device)
        # Positions from the row's first token: 0, 1, ... num_sink - 1, then the last ones.
        recent = valid - kept + entries
        positions = torch.where((entries < num_sink) | (valid <= kept), entries, recent)
        slots = torch.where(positions < valid, positions + start[:, None], -1).to(torch.int32)
        heads = slots[:, None].expand(-1, num_kv_heads, -1)
        return Selection(heads.contiguous())

    def bytes_read(self, geometry: Geometry, n: int, read: int, scanned: int | None = None) -> int:
        return kv_bytes(geometry, read) + self.moved_bytes(geometry, n, read)
