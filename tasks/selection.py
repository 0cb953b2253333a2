"""The quality of a method's selections, without answer scores, for all budgets in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from topkbench.harness.decoding import Decoder, Prompt
from topkbench.harness.quality import MEASURES, OffPolicyObserver
from topkbench.harness.sweep import Plan, Record, Steps
from topkbench.harness.task import Context, Outcome, TaskRow, compact_unsupported_reason
from topkbench.methods.base import AnyMethod, Policy, check_list
from topkbench.tasks.ruler_words import RulerWords


@dataclass(kw_only=True)
class SelectionTask(RulerWords):
    """Recall, attention mass and output error of a method, by layer, KV head, step and budget.

    Full attention decodes RULER prompts with its own answers; at each step the method selects on
    the same states. Answers are not scored: the quality of the selections is the result.

    Attributes:
        budgets: The values of ``k``; the cell's own ``k`` is not used.
    """

    name: str = "selection"
    num_samples: int = 2
    budgets: Sequence[int] = (32, 64, 128, 256, 512)
    parts: ClassVar[Mapping[str, frozenset[str]]] = {"selections": frozenset()}
    together: ClassVar[frozenset[str]] = frozenset()
    needs_full: ClassVar[bool] = False  # full attention selects nothing, so it has no cell here

    def __post_init__(self) -> None:
        super().__post_init__()
        self.all_budgets = True
        check_list("task.budgets", self.budgets, least=1)

    def plan(self, context: Context, prompts: Sequence[Prompt]) -> Plan | Outcome:
        reason = None
        if not context.method.selects:
            reason = "task=selection needs a method that selects; full attention reads all tokens."
        elif context.method.compacts:
            reason = compact_unsupported_reason(self.name)
        if reason is not None:
            return Outcome([TaskRow("mean", {}, "skipped", reason)], [])
        return Plan({"selections": frozenset(prompt.sample.sample_id for prompt in prompts)})

    def measure(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Record:
        resolved = [context.resolved(k) for k in self.budgets]
        return {
            "samples": [
                one for prompt in prompts for one in self._measure(context, prompt, resolved)
            ]
        }

    def steps(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Steps:
        rows = sum(len(one.decode_ids) + one.sample.max_new_tokens for one in prompts)
        return Steps(forwards=rows, own=rows * len(self.budgets), full=rows)

    def outcome(
        self,
        context: Context,
        plan: Plan,
        prompts: Sequence[Prompt],
        records: Mapping[str, Sequence[Record]],
    ) -> Outcome:
        samples = [one for record in records["selections"] for one in record["samples"]]
        outcome = Outcome([], samples)
        longest = max(prompt.most_cached for prompt in prompts)
        for k in self.budgets:
            of_budget = [one for one in samples if one["k"] == k]
            if not of_budget:
                reason = (
                    f"k={k} must be below the number of cached tokens, which was at most {longest};"
                    f" use longer prompts, or leave {k} out of task.budgets."
                )
                outcome.rows.append(TaskRow("mean", {"k": k}, "skipped", reason))
                continue
            means = {
                name: sum(one[name] for one in of_budget) / len(of_budget)
                for name in (*MEASURES, "density")
            }
            outcome.rows.append(
                TaskRow(
                    subtask="mean",
                    values={
                        "k": k,
                        "num_samples": len(prompts),
                        "judged_prompts": len({one["sample_id"] for one in of_budget}),
                        **means,
                    },
                )
            )
        return outcome

    def _measure(
        self, context: Context, prompt: Prompt, resolved: Sequence[tuple[AnyMethod, Policy]]
    ) -> list[dict[str, Any]]:
        answer = context.full_answer(prompt)
        needs = context.method.traits.needs
        decoder = Decoder(context.loaded, context.store, [prompt], len(answer) + 1, needs)
        cache = decoder.cache
        captured = cache.topkbench_captured
        observer = OffPolicyObserver(resolved, cache.capacity, captured)
        with context.attached(decoder, context.full, observer):
            decoder.teacher_force([answer])
        return [
            {
                "sample_id": prompt.sample.sample_id,
                "subtask": prompt.sample.subtask,
                "length": prompt.num_tokens + prompt.sample.max_new_tokens,
                "k": k,
                "layer": layer,
                "kv_head": head,
                "step": step,
                "recall_at_k": quality.recall_at_k[0, head].item(),
                "attention_mass": quality.attention_mass[0, head].item(),
                "output_rel_error": quality.output_rel_error[0, head].item(),
                "density": quality.tokens[0, head].item() / cache.n,
            }
            for k, layer, step, quality in observer.measured
            for head in range(quality.recall_at_k.shape[1])
        ]
