"""Train the shipped model from scratch: its tokenizer, then its weights.

    python tools/train_tiny.py --out models/tiny

Training is a curriculum. It begins with copying (random segments, repeated), which forms the
attention heads that retrieval needs; training on retrieval from noise alone does not form them
within thousands of steps. The prompts of ``ruler_words_prompts`` follow, with many questions per
context, at growing lengths. Where a question has several right answers, every answer not yet given
counts as right (the loss is on the total probability of their first tokens), and the answers are
drawn in random order, so that the model may choose any and cannot rely on an order.
"""

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if __name__ == "__main__":  # lets the script run without installing the package
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".types")

from topkbench.models.tiny_tokenizer import build_tokenizer
from topkbench.tasks import ruler_words_prompts as prompts
from topkbench.tasks.words import random_names, word_pools

log = logging.getLogger(__name__)

WINDOW = 16384
MAX_ALTERNATIVES = prompts.CWE_COMMON


@dataclass(frozen=True)
class Phase:
    """One phase of the curriculum; it ends early at a share ``target`` of right tokens."""

    kind: str
    length: int
    batch_size: int
    steps: int
    learning_rate: float
    target: float


CURRICULUM = (
    Phase("copy", 64, 64, 1500, 1e-3, 0.95),
    Phase("copy", 128, 32, 600, 1e-3, 0.98),
    Phase("recall", 320, 16, 700, 1.5e-3, 0.985),
    Phase("recall", 480, 11, 250, 1e-3, 0.985),
    Phase("mixed", 1024, 5, 350, 1e-3, 0.985),
    Phase("mixed", 2048, 2, 200, 1e-3, 0.99),
    Phase("mixed", 4096, 1, 600, 8e-4, 1.01),
    Phase("mixed", 4096, 1, 400, 6e-4, 1.01),
    Phase("lists", 512, 10, 1000, 1e-3, 0.985),
    Phase("mixed", 1024, 5, 300, 8e-4, 0.985),
    Phase("mixed", 2048, 2, 250, 8e-4, 0.985),
    Phase("mixed", 4096, 1, 400, 8e-4, 1.01),
    Phase("mixed", 4096, 1, 400, 6e-4, 1.01),
    Phase("mixed", 1024, 5, 200, 8e-4, 0.995),
    Phase("mixed", 4096, 1, 600, 8e-4, 1.01),
    Phase("full_lists", 4096, 1, 300, 8e-4, 1.01),
    Phase("mixed", 4096, 1, 500, 8e-4, 1.01),
    Phase("mixed", 4096, 1, 400, 8e-4, 1.01),
)


def vocabulary() -> list[str]:
    """Return the strings that become single tokens: pieces of the prompt templates, and words."""
    test, calibration = word_pools()
    asks = (
        prompts.ask_one("", ""),
        prompts.ask_all_values("", ["", ""]),
        prompts.ask_many(["", ""], ["", ""]),
        prompts.ask_variables("", []),
        prompts.ask_common([]),
        prompts.ask_frequent([]),
        (prompts.needle("", ""), " VAR", " ..."),
        (prompts.FACTS, prompts.VARIABLES, prompts.NUMBERED + prompts.CODED),
    )
    wording = "\n".join(part for ask in asks for part in ask)
    spans = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(wording)
    names = (*random_names(5, upper=True), *random_names(6, upper=False))
    pieces = [piece for _, (begin, end) in spans if (piece := wording[begin:end]).strip(" ")]
    pieces = [piece for piece in pieces if piece == piece.rstrip()] + ["\n"]
    return list(dict.fromkeys([*pieces, *(f" {word}" for word in (*test, *calibration, *names))]))


@dataclass
class TrainingSequence:
    """A token sequence under construction, with the accepted next tokens at trained positions."""

    ids: list[int] = field(default_factory=list)
    targets: list[tuple[int, list[int]]] = field(default_factory=list)

    def read(self, ids: list[int]) -> None:
        """Append tokens that are input only and not trained on."""
        self.ids += ids

    def write(self, ids: list[int], alternatives: list[int] | None = None) -> None:
        """Append tokens to be predicted; for the first, any of ``alternatives`` is accepted."""
        for position, token in enumerate(ids):
            accepted = alternatives if alternatives and position == 0 else [token]
            self.targets.append((len(self.ids) - 1, accepted))
            self.ids.append(token)


class Corpus:
    """Endless training sequences of a given kind and length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.words = [word for pool in word_pools() for word in pool]
        self.key_words, self.value_words = prompts.halves(self.words)
        self.eos = int(tokenizer.eos_token_id)
        self.bos = int(tokenizer.bos_token_id)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def copy(self, length: int) -> TrainingSequence:
        """Return a repeated random segment of random length, so that no fixed offset is learned."""
        sequence = TrainingSequence()
        size = self.rng.randint(length // 8, length // 2)
        segment = [self.rng.randrange(3, len(self.tokenizer)) for _ in range(size)]
        sequence.read(segment + segment[:1])
        sequence.write(segment[1:])
        while len(sequence.ids) < length:
            sequence.write(segment)
        return sequence

    def ask(
        self,
        sequence: TrainingSequence,
        question: str,
        prefix: str,
        answers: list[str],
        link: str = ",",
    ) -> None:
        """Append a question whose ``answers`` are right in any order, with ``link`` between them.

        As the first token of an answer, that of any answer not given yet is accepted.
        """
        sequence.read(self.encode(question + prefix))
        encoded = [self.encode(f" {answer}") for answer in answers]
        for index, ids in enumerate(encoded):
            if index:
                sequence.write(self.encode(link))
            sequence.write(ids, [rest[0] for rest in encoded[index:]])
        sequence.write([*self.encode("."), self.eos])

    def retrieval(
        self, length: int, listed: float = 0.3, fewest: int = prompts.NUM_NEEDLES
    ) -> TrainingSequence:
        """Return a haystack with needles, followed by as many questions about them as fit.

        ``listed`` is the share of the needles whose key has several values: ``fewest`` to four.
        """
        rng = self.rng
        questions = min(length * 9 // 20, 640)  # tokens for the questions
        full = (length - questions - 16) // 8  # number of needles that fill the context
        many_needles = rng.random() < 0.5
        total = (
            int(full * rng.uniform(0.6, 1.0)) if many_needles else rng.randint(8, max(8, full // 6))
        )
        num_values = [rng.randint(fewest, prompts.NUM_NEEDLES) for _ in range(total)]
        num_many = max(1, round(listed * total / 3))
        num_single = max(prompts.NUM_NEEDLES, total - sum(num_values[:num_many]))
        counts = num_values[:num_many] + [1] * num_single
        keys = rng.sample(self.key_words, len(counts))
        # Values of the same key differ in their first word. Those of different keys may share it,
        # so that the model must use the key.
        values = {
            key: [
                f"{first} {rng.choice(self.value_words)}"
                for first in rng.sample(self.value_words, count)
            ]
            for key, count in zip(keys, counts, strict=True)
        }
        needles = [prompts.needle(key, value) for key, of_key in values.items() for value in of_key]
        used = set(keys)
        others = [word for word in rng.sample(self.words, 600) if word not in used]
        tokens_left = length - questions - 8 * len(needles) - 16
        haystack = []
        while tokens_left > 0:
            haystack.append(prompts.filler(rng, others))
            tokens_left -= prompts.SENTENCE_WORDS + 1
        sequence = TrainingSequence()
        body = prompts.FACTS + prompts.scatter(rng, haystack, needles, ordered=False)
        sequence.read([self.bos, *self.encode(body)])
        many, single = keys[:num_many], keys[num_many:]
        rng.shuffle(many)
        rng.shuffle(single)
        while len(sequence.ids) < length - 40:
            kind = rng.random()
            if kind < max(0.5, listed) and many:
                key = many.pop()
                answers = rng.sample(values[key], len(values[key]))
                question, prefix, _ = prompts.ask_all_values(key, answers)
                self.ask(sequence, question, prefix, answers, link=f", {key}")
            elif kind < 0.75 and len(single) >= prompts.NUM_NEEDLES:
                chosen = [single.pop() for _ in range(prompts.NUM_NEEDLES)]
                question, prefix, reference = prompts.ask_many(
                    chosen, [values[key][0] for key in chosen]
                )
                sequence.read(self.encode(question + prefix))
                sequence.write([*self.encode(reference), self.eos])
            elif single:
                key = single.pop()
                question, prefix, reference = prompts.ask_one(key, values[key][0])
                sequence.read(self.encode(question + prefix))
                sequence.write([*self.encode(reference), self.eos])
            elif not many:
                break
        return sequence

    def variables(self, length: int) -> TrainingSequence:
        """Return chains of assignments in noise, followed by a question about each chain."""
        rng = self.rng
        num_chains = rng.randint(1, max(1, min(6, length // 160)))
        names = rng.sample(random_names(5, upper=True), num_chains * (prompts.VT_HOPS + 1))
        width = prompts.VT_HOPS + 1
        chains = [names[index * width : (index + 1) * width] for index in range(num_chains)]
        values = [str(number) for number in rng.sample(range(10000, 100000), num_chains)]
        statements: list[str] = []
        for chain, value in zip(chains, values, strict=True):
            assignments = prompts.assignment_chain(rng, chain, value)
            statements = merge(rng, statements, assignments)
        tokens_left = length - sum(map(self.count, statements)) - 32 * num_chains - 20
        haystack = [
            prompts.filler(rng, self.words)
            for _ in range(tokens_left // (prompts.SENTENCE_WORDS + 1))
        ]
        sequence = TrainingSequence()
        body = prompts.VARIABLES + prompts.scatter(rng, haystack, statements, ordered=True)
        sequence.read([self.bos, *self.encode(body)])
        for chain, value in rng.sample(list(zip(chains, values, strict=True)), num_chains):
            question, prefix, reference = prompts.ask_variables(value, chain)
            sequence.read(self.encode(question + prefix))
            sequence.write([*self.encode(reference), self.eos])
        return sequence

    def counting(self, length: int) -> TrainingSequence:
        """Return a question for the most common words of a list or coded words of a text."""
        subtask = self.rng.choice(("cwe", "fwe"))
        prompt = prompts.make_prompt(subtask, self.rng, self.words, length - 1, self.count)
        sequence = TrainingSequence()
        sequence.read([self.bos, *self.encode(prompt.context)])
        answers = self.rng.sample(list(prompt.answers), len(prompt.answers))
        self.ask(sequence, prompt.question, prompt.answer_prefix, answers)
        return sequence

    def draw(self, kind: str, length: int) -> TrainingSequence:
        if kind == "mixed":
            kind = self.rng.choices(("recall", "variables", "counting"), (0.85, 0.08, 0.07))[0]
        make = {
            "copy": self.copy,
            "recall": self.retrieval,
            "lists": lambda length: self.retrieval(length, listed=0.85, fewest=2),
            "full_lists": lambda length: self.retrieval(length, listed=0.85),
            "variables": self.variables,
            "counting": self.counting,
        }[kind]
        sequence = make(length)
        targets = [(position, ids) for position, ids in sequence.targets if position < length - 1]
        return TrainingSequence(sequence.ids[:length], targets)

    def batches(self, kind: str, length: int, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches: ids [B, L], positions [P] in the flat batch, accepted tokens [P, 10].

        Unused entries of the accepted tokens are -1.
        """
        while True:
            ids = torch.full((batch_size, length), int(self.tokenizer.pad_token_id))
            positions: list[int] = []
            accepted: list[list[int]] = []
            for row in range(batch_size):
                sequence = self.draw(kind, length)
                ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
                for position, tokens in sequence.targets:
                    positions.append(row * length + position)
                    accepted.append(tokens + [-1] * (MAX_ALTERNATIVES - len(tokens)))
            yield ids, torch.tensor(positions), torch.tensor(accepted)


def merge(rng: random.Random, first: list[str], second: list[str]) -> list[str]:
    """Return two lists interleaved at random, keeping the order within each."""
    turns = [0] * len(first) + [1] * len(second)
    rng.shuffle(turns)
    sources = (iter(first), iter(second))
    return [next(sources[turn]) for turn in turns]


def config(vocab_size: int) -> LlamaConfig:
    """Return the shape of the shipped model."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def forward(
    model: LlamaForCausalLM, ids: Tensor, positions: Tensor, accepted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, hits [P] bool, open_ended [P] bool).

    ``hits`` marks right predictions, ``open_ended`` targets with several accepted tokens. The loss
    is minus the log of the total probability of the accepted tokens.
    """
    hidden = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)[positions]
    logits = model.lm_head(hidden)
    mass = logits.log_softmax(-1).gather(1, accepted.clamp_min(0))
    mass = mass.masked_fill(accepted < 0, -torch.inf).logsumexp(-1)
    hits = (logits.argmax(-1, keepdim=True) == accepted).any(-1)
    return -mass.mean(), hits.detach(), (accepted[:, 1] >= 0)


def accuracy(model: LlamaForCausalLM, corpus: Corpus, phase: Phase) -> tuple[float, float]:
    """Return the shares of right tokens on new sequences: of all, and of the open-ended ones."""
    model.eval()
    with torch.no_grad():
        batch = next(corpus.batches(phase.kind, phase.length, max(4, phase.batch_size)))
        _, hits, open_ended = forward(model, *batch)
    model.train()
    many = hits[open_ended].float().mean().item() if open_ended.any() else float("nan")
    return hits.float().mean().item(), many


def train(out: Path, seed: int, first_phase: int, steps_scale: float) -> None:
    """Train through the curriculum and save the model and the tokenizer after each phase."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(vocabulary(), WINDOW)
    model = (
        LlamaForCausalLM.from_pretrained(out)
        if first_phase
        else LlamaForCausalLM(config(len(tokenizer)))
    )
    log.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    corpus, validation = Corpus(tokenizer, seed), Corpus(tokenizer, seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    start = time.perf_counter()
    recipe = out / "recipe.json"
    history = json.loads(recipe.read_text()).get("history", []) if first_phase else []
    for number, phase in enumerate(CURRICULUM[first_phase:], start=first_phase):
        batches = corpus.batches(phase.kind, phase.length, phase.batch_size)
        steps = max(1, round(phase.steps * steps_scale))
        last = number == len(CURRICULUM) - 1
        for step in range(steps):
            decay = 1 - step / steps if last else 1.0
            for group in optimizer.param_groups:
                group["lr"] = phase.learning_rate * min(1.0, (step + 1) / 100) * decay
            loss, _, _ = forward(model, *next(batches))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 50 == 0 or step == steps - 1:
                share, many = accuracy(model, validation, phase)
                seconds = time.perf_counter() - start
                log.info(
                    "%5.0f s  phase %d %s %d  step %d  loss %.3f  right %.3f  open %.3f",
                    *(seconds, number, phase.kind, phase.length, step + 1),
                    *(loss.item(), share, many),
                )
                done = {**vars(phase), "seed": seed, "steps": step + 1, "right": round(share, 4)}
                if (step + 1) % 200 == 0:
                    save(model, tokenizer, out, [*history, done])
                if share >= phase.target and not (many < phase.target - 0.1):
                    break
        history.append(done)
        save(model, tokenizer, out, history)


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    history: list[dict[str, Any]],
) -> None:
    """Write the model and tokenizer in Hugging Face's layout, with the phases run so far."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps({"history": history}, indent=2) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-phase", type=int, default=0, help="continue from a saved phase")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="scale every phase's steps")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(options.out, options.seed, options.first_phase, options.steps_scale)


if __name__ == "__main__":
    main()
