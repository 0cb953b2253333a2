"""The quality of a method's selections, apart from any score: for all budgets from one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from topkbench.harness.decoding import Decoder, Prompt
from topkbench.harness.evaluation import Context, Outcome, TaskRow, needs_all_tokens, tokenised
from topkbench.harness.quality import OffPolicyObserver
from topkbench.methods.base import Policy
from topkbench.tasks.ruler import Ruler


@dataclass(kw_only=True)
class SelectionTask(Ruler):
    """Recall, mass and output error of a method, per layer, KV head and step, for all budgets.

    Full attention decodes RULER prompts with its own answers; the method is asked beside it, on
    the same states. No score: the quality of a selection is the result.

    Attributes:
        budgets: The values of ``k``; the cell's own ``k`` plays no part.
    """

    name: str = "selection"
    num_samples: int = 2
    budgets: Sequence[int] = (32, 64, 128, 256, 512)
    parts: ClassVar[Mapping[str, frozenset[str]]] = {"selections": frozenset()}
    needs_full: ClassVar[bool] = False  # it is no cell of this task: it selects nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        self.all_budgets = True
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(
                f"task.budgets must be one value of k or more, each at least 1, got {self.budgets}."
            )

    def run(self, context: Context) -> Outcome:
        if not context.method.selects:
            reason = "task=selection needs a method that selects, and full attention reads all."
            return Outcome([TaskRow("mean", {}, "skipped", reason)], [])
        if context.method.compacts:
            return Outcome([TaskRow("mean", {}, "skipped", needs_all_tokens(self.name))], [])
        policies = [
            context.method.effective_policy(replace(context.policy, k=k)) for k in self.budgets
        ]
        samples = self.samples(context.loaded)
        outcome = Outcome(samples=[], rows=[])
        for prompt in context.track(tokenised(context.loaded, samples, self.question), "selection"):
            outcome.samples += self._measure(context, prompt, policies)
        for k in self.budgets:
            mine = [one for one in outcome.samples if one["k"] == k]
            if not mine:
                reason = f"no decode step had more than k={k} cached tokens to choose from."
                outcome.rows.append(TaskRow("mean", {"k": k}, "skipped", reason))
                continue
            means = {
                name: sum(one[name] for one in mine) / len(mine)
                for name in ("recall_at_k", "attention_mass", "output_rel_error", "density")
            }
            outcome.rows.append(
                TaskRow(subtask="mean", values={"k": k, "num_samples": len(samples), **means})
            )
        return outcome

    def _measure(
        self, context: Context, prompt: Prompt, policies: Sequence[Policy]
    ) -> list[dict[str, Any]]:
        answer = context.full_answer(prompt)
        read = len(prompt.prefill_ids) + len(prompt.decode_ids)
        needs = context.method.needs
        decoder = Decoder(context.loaded, context.store, [prompt], len(answer) + 1, needs)
        cache = decoder.cache
        captured = cache.topkbench_captured
        observer = OffPolicyObserver(
            context.method, policies, len(cache.layers), cache.capacity, captured
        )
        with context.attached(decoder, context.full, observer):
            decoder.follow([answer])
        return [
            {
                "sample_id": prompt.sample.sample_id,
                "subtask": prompt.sample.subtask,
                "length": read + prompt.sample.max_new_tokens,
                "k": k,
                "layer": layer,
                "kv_head": head,
                "step": step,
                "recall_at_k": found.recall_at_k[0, head].item(),
                "attention_mass": found.attention_mass[0, head].item(),
                "output_rel_error": found.output_rel_error[0, head].item(),
                "density": found.tokens[0, head].item() / cache.n,
            }
            for k, layer, step, found in observer.seen
            for head in range(found.recall_at_k.shape[1])
        ]
