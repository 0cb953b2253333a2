"""The decoding loop: prefill and decode give the same answers as the model's own generate."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from topkbench.harness.decoding import (
    Decoder,
    Prompt,
    Question,
    batches,
    by_subtask,
    is_wrapped,
    prefilled_once,
    spread_over_subtasks,
    tokenise,
)
from topkbench.harness.samples import Sample, TaskDoesNotFit
from topkbench.methods.base import AnyMethod, Policy
from topkbench.methods.exact import ExactTopK
from topkbench.methods.full import FullAttention
from topkbench.methods.pqcache import PQCache
from topkbench.methods.quest import Quest
from topkbench.models.attach import attach
from topkbench.models.compat import cache_keyword
from topkbench.models.encoding import answer_ends
from topkbench.models.load import LoadedModel, load_model
from topkbench.models.prefill_store import PrefillStore
from topkbench.tasks.ruler_words import RulerWords

# The first is by far the longest, so that the rows of a batch end at different slots.
CONTEXTS = ("the secret of word " * 17, "hidden text and facts " * 6, "list every other value")
QUESTION = " which word below"
NEW_TOKENS = 12


def sample(context: str, name: str = "0", subtask: str = "vt", new: int = NEW_TOKENS) -> Sample:
    return Sample(
        sample_id=name,
        subtask=subtask,
        context=context,
        question=QUESTION,
        answer_prefix=" answer",
        answers=("x",),
        max_new_tokens=new,
        length=0,
    )


def prompts(loaded: LoadedModel, question: Question) -> list[Prompt]:
    return [
        tokenise(loaded, sample(context, str(number)), question)
        for number, context in enumerate(CONTEXTS)
    ]


def answer(
    loaded: LoadedModel, store: PrefillStore, batch: list[Prompt], method: AnyMethod, k: int = 24
) -> list[list[int]]:
    decoder = Decoder(loaded, store, batch, NEW_TOKENS + 1)
    with attach(loaded.model, method, Policy(k=k)):
        return decoder.generate()


TEMPLATE = (
    "{{ bos_token }}<|user|>{{ messages[0].content }}<|assistant|>"
    "{% if mood is defined %} {{ mood }}:{% endif %}"
)


@pytest.fixture(scope="module")
def chat(loaded: LoadedModel) -> LoadedModel:
    """The model with a chat template."""
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    return replace(loaded, tokenizer=tokenizer, chat=True)


def text_of(loaded: LoadedModel, ids: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(list(ids)))


def test_a_prompt_is_wrapped_in_the_chat_template_and_then_cut(chat: LoadedModel) -> None:
    sparse = tokenise(chat, sample("the secret"), "sparse")
    assert text_of(chat, sparse.prefill_ids) == "<bos><|user|>the secret"
    assert text_of(chat, sparse.decode_ids) == f"{QUESTION}<|assistant|> answer"
    dense = tokenise(chat, sample("the secret"), "dense")
    assert dense.prefill_ids == sparse.prefill_ids + sparse.decode_ids
    cheerful = replace(chat, chat_template_kwargs={"mood": "list"})
    found = tokenise(cheerful, sample("the secret"), "sparse")
    assert text_of(chat, found.decode_ids) == f"{QUESTION}<|assistant|> list: answer"


def test_an_official_prompt_is_wrapped_once(chat: LoadedModel, loaded: LoadedModel) -> None:
    raw = replace(sample("the secret"), official=True)
    whole = tokenise(chat, raw, "dense").prefill_ids
    assert text_of(chat, whole) == f"<bos><|user|>the secret{QUESTION}<|assistant|> answer"
    raw_with_bos = replace(raw, context=f"<bos>{raw.context}")
    assert tokenise(chat, raw_with_bos, "dense").prefill_ids == whole
    assert [is_wrapped(one, raw) for one in (chat, replace(chat, chat=False))] == [True, False]
    wrapped = replace(raw, context="<|user|>the secret", question=f"{QUESTION}<|assistant|>")
    with_bos = replace(wrapped, context=f"<bos>{wrapped.context}")
    for given in (wrapped, with_bos):
        assert tokenise(chat, given, "dense").prefill_ids == whole
        assert tokenise(replace(chat, chat=False), given, "dense").prefill_ids == whole
        assert is_wrapped(replace(chat, chat=False), given)


def test_question_tokens_are_the_last_of_a_message_in_its_template(chat: LoadedModel) -> None:
    given = replace(sample("the secret which word"), question="", question_tokens=2, official=True)
    found = tokenise(chat, given, "sparse")
    assert text_of(chat, found.prefill_ids) == "<bos><|user|>the secret"
    assert text_of(chat, found.decode_ids) == " which word<|assistant|> answer"


def test_chat_without_a_template_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"^model\.chat=true needs a chat template, and the model"):
        tokenise(replace(loaded, chat=True), sample(CONTEXTS[0]), "sparse")


def test_an_answer_ends_at_the_tokenizers_end_too(tmp_path: Path) -> None:
    """A base model's generation settings under a chat tokenizer name another end."""
    shipped = load_model("tiny", "tiny", short_answers=True)
    shipped.model.generation_config.eos_token_id = 0
    shipped.model.config.eos_token_id = None
    task = RulerWords(length=512, num_samples=1, subtasks=["niah_single"], cache_dir=str(tmp_path))
    prompt = tokenise(shipped, task.samples(shipped)[0], "sparse")
    store = PrefillStore(shipped.model)
    (tokens,) = answer(shipped, store, [prompt], FullAttention())
    assert len(tokens) == 3


def test_full_attention_generates_what_the_models_generate_does(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    for prompt in prompts(loaded, "dense"):
        ids = torch.tensor([prompt.prefill_ids])
        generated = loaded.model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)
        expected = generated[0, ids.shape[1] :].tolist()
        if expected[-1] in answer_ends(loaded):
            expected.pop()
        assert answer(loaded, store, [prompt], FullAttention()) == [expected]


def test_full_attention_answers_the_same_with_a_decoded_question(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    for dense, sparse in zip(prompts(loaded, "dense"), prompts(loaded, "sparse"), strict=True):
        assert len(sparse.decode_ids) == 4
        expected = answer(loaded, store, [dense], FullAttention())
        assert answer(loaded, store, [sparse], FullAttention()) == expected


@pytest.mark.parametrize(
    "method", [FullAttention(), ExactTopK(), Quest(page_size=4)], ids=lambda method: method.name
)
@pytest.mark.parametrize("question", ["sparse", "dense"])
def test_a_batch_gives_the_same_answers_as_single_prompts(
    loaded: LoadedModel, store: PrefillStore, method: AnyMethod, question: Question
) -> None:
    together = prompts(loaded, question)
    assert len({len(prompt.prefill_ids) for prompt in together}) == 3
    alone = [answer(loaded, store, [prompt], method)[0] for prompt in together]
    assert answer(loaded, store, together, method) == alone


def test_a_budget_of_all_tokens_gives_full_attentions_answers(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    together = prompts(loaded, "sparse")
    expected = answer(loaded, store, together, FullAttention())
    assert answer(loaded, store, together, Quest(page_size=4), k=500) == expected


def test_each_row_stops_at_its_own_limit(loaded: LoadedModel, store: PrefillStore) -> None:
    batch = [
        tokenise(loaded, sample(CONTEXTS[1], str(new), new=new), "sparse") for new in (0, 1, 5)
    ]
    found = answer(loaded, store, batch, FullAttention())
    assert len(found[0]) == 0
    assert len(found[1]) <= 1
    assert found[2][:1] == found[1]


def test_the_eos_token_ends_an_answer_and_is_not_part_of_it(
    loaded: LoadedModel, store: PrefillStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt, *_) = prompts(loaded, "dense")
    (tokens,) = answer(loaded, store, [prompt], FullAttention())
    stop = next(token for place, token in enumerate(tokens) if place >= 2)
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [stop])
    assert answer(loaded, store, [prompt], FullAttention()) == [tokens[: tokens.index(stop)]]


def test_teacher_forcing_puts_the_given_tokens_into_the_cache(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    (_, prompt, _) = prompts(loaded, "sparse")
    forced = [5, 9, 300]
    decoder = Decoder(loaded, store, [prompt], len(forced))
    with attach(loaded.model, FullAttention(), Policy(k=24)):
        decoder.teacher_force([forced])
    assert decoder.cache.n == len(prompt.prefill_ids) + len(prompt.decode_ids) + 3
    ids = torch.tensor([[*prompt.prefill_ids, *prompt.decode_ids, *forced]])
    whole = DynamicCache()
    loaded.model(ids, **cache_keyword(loaded.model, whole))
    torch.testing.assert_close(
        decoder.cache.layers[1].keys[:, :, : ids.shape[1]],
        whole.layers[1].keys,
        rtol=1e-4,
        atol=1e-4,
    )


def test_batches_do_not_mix_subtasks() -> None:
    def made(name: str, subtask: str, question: int) -> Prompt:
        return Prompt(sample("x", name, subtask), (1, 2), tuple(range(question)))

    all_prompts = [made("a", "vt", 3), made("b", "vt", 4), made("c", "vt", 3), made("d", "cwe", 3)]
    all_prompts += [made("e", "vt", 3)]
    names = [[one.sample.sample_id for one in group] for group in batches(all_prompts, 2)]
    assert names == [["a", "b"], ["c", "e"], ["d"]]


def test_the_prompts_of_a_document_are_in_one_batch() -> None:
    def made(document: str, turn: int, prefilled: int) -> Prompt:
        one = sample("x", f"{document}{turn}", f"turn_{turn}")
        return Prompt(replace(one, document=document), (prefilled,), ())

    prompts = [made(name, turn, ord(name)) for name in "abc" for turn in (1, 2)]
    found = batches(prompts, 2)
    names = [[one.sample.sample_id for one in group] for group in found]
    assert names == [["a1", "a2", "b1", "b2"], ["c1", "c2"]]
    assert by_subtask(found[0]) == [found[0][0::2], found[0][1::2]]
    assert prefilled_once(found[0]) == found[0][0::2]


@pytest.mark.parametrize("method", [FullAttention(), ExactTopK(), Quest(page_size=4)])
def test_questions_of_a_batch_may_differ_in_length(
    loaded: LoadedModel, store: PrefillStore, method: AnyMethod
) -> None:
    """A row whose question is shorter answers while the others are still read."""
    (first, second, third) = prompts(loaded, "sparse")
    batch = [
        first,
        replace(second, decode_ids=second.decode_ids[:2]),
        replace(third, decode_ids=third.decode_ids * 3),
    ]
    alone = [answer(loaded, store, [prompt], method, 16)[0] for prompt in batch]
    assert answer(loaded, store, batch, method, 16) == alone
    assert min(map(len, alone)) > 0


def test_forced_rows_must_have_the_same_number_of_tokens(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    (first, second, _) = prompts(loaded, "sparse")
    decoder = Decoder(loaded, store, [first, second], 2)
    longer = [*range(len(first.decode_ids) - len(second.decode_ids) + 2)]
    with pytest.raises(ValueError, match="rows that are forced must have the same number of"):
        decoder.teacher_force([[5], [5, 6, *longer]])


def test_few_prompts_are_spread_over_the_subtasks() -> None:
    names = {"a": "vt", "b": "vt", "c": "cwe", "d": "fwe"}
    prompts = [Prompt(sample("", name, subtask), (), ()) for name, subtask in names.items()]
    few = [one.sample.sample_id for one in spread_over_subtasks(prompts, 3)]
    assert few == ["a", "c", "d"]
    everything = [one.sample.sample_id for one in spread_over_subtasks(prompts, 9)]
    assert everything == ["a", "c", "d", "b"]


def test_a_prompt_longer_than_the_window_is_refused(loaded: LoadedModel) -> None:
    message = (
        r"must fit the window of 1024 tokens of random, got \d+ in sample 0; use a smaller "
        r"task\.length\.$"
    )
    with pytest.raises(TaskDoesNotFit, match=message):
        tokenise(loaded, sample("the secret of word " * 400), "dense")


def test_a_sparse_question_needs_a_question(loaded: LoadedModel) -> None:
    bare = Sample(
        sample_id="s",
        subtask="vt",
        context="text",
        question="",
        answer_prefix="",
        answers=("x",),
        max_new_tokens=1,
        length=0,
    )
    with pytest.raises(ValueError, match=r"sample s has none; set task\.question_tokens"):
        tokenise(loaded, bare, "sparse")
    with pytest.raises(ValueError, match="question must be sparse or dense, got 'half'"):
        tokenise(loaded, bare, "half")  # type: ignore[arg-type]


def test_prompts_shared_by_methods_are_prefilled_once(
    loaded: LoadedModel, store: PrefillStore, tmp_path: Path
) -> None:
    together = prompts(loaded, "sparse")
    for method in (FullAttention(), ExactTopK(), Quest(page_size=4)):
        for k in (16, 24):
            answer(loaded, store, together, method, k)
    assert store.forwards == 3
    answer(loaded, store, prompts(loaded, "dense"), FullAttention())
    assert store.forwards == 6  # with question=dense other tokens are prefilled


KNOWN = ((5, 6, 7, 8), (9,), (4, 3, 2))


@pytest.mark.parametrize("method", [ExactTopK(), PQCache(bits=2), FullAttention()])
def test_known_tokens_of_rows_are_as_many_as_each_row_has(
    loaded: LoadedModel, store: PrefillStore, method: AnyMethod
) -> None:
    """In one forward, padded behind; the rows then decode on as each does alone."""
    batch, policy = prompts(loaded, "dense"), Policy(k=24)

    def logits(rows: list[Prompt], given: Sequence[Sequence[int]]) -> torch.Tensor:
        decoder = Decoder(loaded, store, rows, 8)
        with attach(loaded.model, method, policy) as session:
            after = decoder.forward(given)
            then = decoder.step(torch.full((len(rows),), 11))
        assert decoder.cache.ends == [
            len(one.prefill_ids) + len(tokens) + 1 for one, tokens in zip(rows, given, strict=True)
        ]
        if method.selects:
            session.require_steps(decoder.steps_over(24))
        return torch.stack([after, then])

    together = logits(batch, KNOWN)
    for row, given in enumerate(KNOWN):
        alone = logits([batch[row]], [given])
        torch.testing.assert_close(together[:, [row]], alone, atol=2e-4, rtol=1e-4)


def test_a_row_without_known_tokens_keeps_its_logits(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    batch = prompts(loaded, "dense")
    decoder = Decoder(loaded, store, batch, 8)
    with attach(loaded.model, ExactTopK(), Policy(k=24)):
        logits = decoder.forward([(5, 6), (), (7,)])
    assert torch.equal(logits[1], decoder.first_logits[1])
    assert decoder.cache.ends == [
        len(one.prefill_ids) + count for one, count in zip(batch, (2, 0, 1), strict=True)
    ]


@pytest.mark.parametrize("method", [ExactTopK(), Quest(page_size=4), FullAttention()])
def test_logits_after_every_known_token_are_those_of_single_steps(
    loaded: LoadedModel, store: PrefillStore, method: AnyMethod
) -> None:
    given = [[5, 6, 7, 8, 9]] * 3

    def found(known: bool) -> torch.Tensor:
        decoder = Decoder(loaded, store, prompts(loaded, "dense"), 8)
        with attach(loaded.model, method, Policy(k=24)):
            if known:
                return decoder.forward(given, every=True)
            steps = torch.tensor(given).unbind(1)
            return torch.stack([decoder.step(tokens) for tokens in steps], 1)

    torch.testing.assert_close(found(True), found(False), atol=2e-4, rtol=1e-4)


def test_answers_do_not_depend_on_how_the_question_is_decoded(
    loaded: LoadedModel, store: PrefillStore
) -> None:
    batch = prompts(loaded, "sparse")
    for method in (ExactTopK(), FullAttention()):
        answers = []
        for known in ("together", "one by one"):
            decoder = Decoder(loaded, store, batch, NEW_TOKENS + 1)
            with attach(loaded.model, method, Policy(k=24)):
                answers.append(decoder.generate(known))
        assert answers[0] == answers[1]


@pytest.mark.parametrize("method", [FullAttention(), Quest(), PQCache()], ids=lambda one: one.name)
def test_a_model_with_offloaded_layers_answers_alike(method: AnyMethod, tmp_path: Path) -> None:
    """As ``model.device_map=auto`` leaves a model that does not fit the devices."""
    accelerate = pytest.importorskip("accelerate")
    whole, spread = (load_model("tiny", "tiny") for _ in range(2))
    for number in (1, 3):
        layer = spread.model.model.layers[number]
        accelerate.disk_offload(layer, str(tmp_path / str(number)), torch.device("cpu"))
        assert {one.device.type for one in layer.parameters()} == {"meta"}
    found = [
        answer(one, PrefillStore(one.model), prompts(one, "sparse"), method)
        for one in (whole, spread)
    ]
    assert found[0] == found[1]
