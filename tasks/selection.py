"""The quality of a method's selections, without answer scores, for all budgets in one pass."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from topkbench.harness.decoding import Decoder, Prompt
from topkbench.harness.generation import spread
from topkbench.harness.quality import MEASURES, StepRecorder, off_policy_quality
from topkbench.harness.sweep import Plan, PromptTask, Record, Steps
from topkbench.harness.task import Context, Outcome, TaskRow, compact_unsupported_reason
from topkbench.methods.base import check_list, check_whole
from topkbench.tasks.ruler_words import RulerWords


@dataclass(kw_only=True)
class Selection(PromptTask):
    """Recall, attention mass and output error of a method, by layer, KV head, step and budget.

    Full attention decodes each prompt once; at each step all methods select on the same states.
    Prompts are measured one after the other, so that the steps of one are in memory.

    Attributes:
        budgets: The values of ``k``; the cell's own ``k`` is not used.
        judged_tokens: Decode steps of a prompt that are measured, spread evenly over those of the
            question and of as many first tokens of the answer; None for all.
    """

    budgets: Sequence[int] = (32, 64, 128, 256, 512)
    judged_tokens: int | None = None
    parts: ClassVar[Mapping[str, frozenset[str]]] = {"selections": frozenset()}
    together: ClassVar[frozenset[str]] = frozenset()
    needs_full: ClassVar[bool] = False  # full attention selects nothing, so it has no cell here

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # that of the prompts
        self.all_budgets = True
        check_list("task.budgets", self.budgets, least=1)
        if self.judged_tokens is not None:
            check_whole("task.judged_tokens", self.judged_tokens)

    def plan(self, context: Context, prompts: Sequence[Prompt]) -> Plan | Outcome:
        reason = None
        if not context.method.selects:
            reason = (
                f"task={self.name} needs a method that selects; full attention reads all tokens."
            )
        elif context.method.compacts:
            reason = compact_unsupported_reason(self.name)
        if reason is not None:
            return Outcome([TaskRow("mean", {}, "skipped", reason)], [])
        return Plan({"selections": frozenset(prompt.sample.sample_id for prompt in prompts)})

    def measure(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Record:
        return {"samples": [one for prompt in prompts for one in self._measure(context, prompt)]}

    def steps(self, context: Context, plan: Plan, part: str, prompts: Sequence[Prompt]) -> Steps:
        # Full attention decodes once for all cells, whose steps are on what was recorded.
        rows = sum(
            min(self.judged_tokens or math.inf, len(one.decode_ids) + one.sample.max_new_tokens)
            for one in prompts
        )
        return Steps(own=int(rows) * len(self.budgets), full=int(rows))

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
                        **self.shared_columns(prompts),
                        "judged_prompts": len({one["sample_id"] for one in of_budget}),
                        "judged_tokens": len(
                            {(one["sample_id"], one["step"]) for one in of_budget}
                        ),
                        **means,
                    },
                )
            )
        return outcome

    def shared_columns(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return columns of every row that the configuration does not tell."""
        return {}

    def answer(self, context: Context, prompt: Prompt) -> Sequence[int]:
        """Return the tokens that follow the question."""
        return context.full_answer(prompt)[: self.judged_tokens]

    def _measure(self, context: Context, prompt: Prompt) -> list[dict[str, Any]]:
        resolved = [context.resolved(k) for k in self.budgets]
        decoder, recorder = self._recorded(context, prompt)
        cache = decoder.cache
        judged = None
        if self.judged_tokens is not None:
            sparse = [n for n in decoder.lengths if n > min(self.budgets)]
            judged = frozenset(spread(sparse, self.judged_tokens))
        found = off_policy_quality(
            resolved, recorder.steps, cache.capacity, cache.topkbench_captured, judged
        )
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
                "density": quality.tokens[0, head].item() / decoder.lengths[step],
            }
            for k, layer, step, quality in found
            for head in range(quality.recall_at_k.shape[1])
        ]

    def _recorded(self, context: Context, prompt: Prompt) -> tuple[Decoder, StepRecorder]:
        """Decode a prompt with full attention, once for all cells."""
        answer = self.answer(context, prompt)
        needs = context.method.traits.needs
        # What any of the cells needs of the prefill was captured with it.
        needs |= context.store.get(prompt.prefill_ids, needs).needs
        key = ("steps of full attention", prompt, len(answer), needs)
        if key not in context.store.shared:
            decoder = Decoder(context.loaded, context.store, [prompt], len(answer) + 1, needs)
            recorder = StepRecorder(needs)
            with context.attached(decoder, context.full, recorder):
                decoder.teacher_force([answer])
            context.store.shared[key] = decoder, recorder
        found: tuple[Decoder, StepRecorder] = context.store.shared[key]
        return found


@dataclass(kw_only=True)
class SelectionTask(Selection, RulerWords):
    """Selections on prompts in the manner of RULER, while full attention answers them."""

    name: str = "selection"
    num_samples: int = 2
    batch_size: int | Literal["auto"] = 1
