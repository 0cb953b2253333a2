"""How texts become tokens: cut where the text is cut, special tokens once, the template's forms."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from topkbench.models.encoding import (
    answer_ends,
    beginning,
    check_template_arguments,
    encode,
    encode_split,
    has_template,
    render_chat,
    template_between,
    token_texts,
)
from topkbench.models.load import LoadedModel
from topkbench.models.tiny_tokenizer import build_tokenizer

CONTEXT, QUESTION = "The secret is \U0001f436 dög.", "\nWhat is the secret?"
LETTERS = sorted({"\u2581", *CONTEXT, *QUESTION})
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
VOCABULARY = {**SPECIAL, **{letter: 3 + place for place, letter in enumerate(LETTERS)}}
Make = Callable[[], PreTrainedTokenizerBase]


def fast(rules: Tokenizer, single: str, first: str = "<s>", last: str = "</s>") -> Any:
    special = [(token, rules.token_to_id(token)) for token in (first, last)]
    rules.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    names = {"bos_token": first, "eos_token": last, "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=rules, **names)


def of_llama_2(single: str = "<s> $A") -> Any:
    """Puts a piece before every text that it is given."""
    rules = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<unk>"))
    rules.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return fast(rules, single)


def of_bytes() -> PreTrainedTokenizerBase:
    return build_tokenizer([" secret", " is", " the"], 64)


def of_merged_bytes() -> PreTrainedTokenizerBase:
    """A byte-level BPE, one of whose tokens reaches over the cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: place for place, piece in enumerate([*SPECIAL, *alphabet, ".Ċ"])}
    rules = Tokenizer(models.BPE(vocab=vocabulary, merges=[(".", "Ċ")]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return fast(rules, "$A")


def of_unigram() -> PreTrainedTokenizerBase:
    """Ends every text with its end token, as T5's does."""
    pieces = [(piece, -1.0) for piece in VOCABULARY] + [("\u2581is", -1.0), (".\n", -0.5)]
    rules = Tokenizer(models.Unigram(pieces, unk_id=0))
    rules.pre_tokenizer = pre_tokenizers.Metaspace()
    return fast(rules, "$A </s>")


def of_word_pieces() -> PreTrainedTokenizerBase:
    words = ["the", "secret", "is", ".", "what", "?", "d", "##og", "##ö", "##g"]
    vocabulary = {one: place for place, one in enumerate(["<unk>", "[CLS]", "[SEP]", *words])}
    rules = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    rules.normalizer = normalizers.BertNormalizer(lowercase=True)
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return fast(rules, "[CLS] $A [SEP]", "[CLS]", "[SEP]")


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python, which gives no offsets; a full stop joins what follows it."""

    def __init__(self, **names: Any) -> None:
        self.ids = {**VOCABULARY, ".\n": len(VOCABULARY)}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **names)

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [piece for part in text.split(".\n") for piece in [*part, ".\n"]][:-1]

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return {number: piece for piece, number in self.ids.items()}[index]


TOKENIZERS: dict[str, Make] = {
    "a piece before every text": of_llama_2,
    "an end after every text": lambda: of_llama_2("<s> $A </s>"),
    "bytes": of_bytes,
    "bytes merged over the cut": of_merged_bytes,
    "unigrams": of_unigram,
    "word pieces": of_word_pieces,
    "no offsets": Slow,
}


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_cut_text_has_the_tokens_of_the_whole(make: Make) -> None:
    tokenizer = make()
    text = CONTEXT + QUESTION
    whole = tokenizer.encode(text, add_special_tokens=False)
    first = beginning(tokenizer)
    assert encode(tokenizer, text) == first + whole
    for cut in range(len(text) + 1):
        before, after = encode_split(tokenizer, text, cut)
        assert before + after == first + whole
        # What stands before the cut does not depend on what follows it.
        other, _ = encode_split(tokenizer, text[:cut] + "?" + text[cut:], cut)
        assert before[:-1] == other[: len(before) - 1]


def test_no_piece_stands_at_the_cut_that_is_not_in_the_text() -> None:
    tokenizer = of_llama_2("<s> $A </s>")
    before, after = encode_split(tokenizer, "The secret is dög.\nWhat?", 18)
    pieces = tokenizer.convert_ids_to_tokens
    assert "".join(pieces(before)) == "<s>\u2581The\u2581secret\u2581is\u2581dög."
    assert "".join(pieces(after)) == "\nWhat?"


def test_a_token_on_both_sides_of_the_cut_belongs_to_the_second_part() -> None:
    for tokenizer in (of_merged_bytes(), of_unigram(), Slow()):
        before, after = encode_split(tokenizer, CONTEXT + QUESTION, len(CONTEXT))
        joined = tokenizer.convert_ids_to_tokens(after[0])
        assert joined in (".Ċ", ".\n")
        assert tokenizer.convert_ids_to_tokens(before[-1]) == "g"


def test_a_character_of_several_tokens_is_not_divided() -> None:
    tokenizer = of_bytes()
    before, after = encode_split(tokenizer, "a\U0001f436b", 1)
    assert (len(before), len(after)) == (2, 5)  # <bos> a | four bytes, b
    before, after = encode_split(tokenizer, "a\U0001f436b", 2)
    assert (len(before), len(after)) == (6, 1)


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (of_llama_2, [1]),
        (lambda: of_llama_2("<s> $A </s>"), [1]),
        (of_bytes, [1]),
        (of_merged_bytes, []),  # it has <s>, and puts it nowhere
        (of_unigram, []),
        (of_word_pieces, [1]),
    ],
)
def test_a_text_begins_with_what_its_tokenizer_puts_there_once(
    make: Make, first: list[int]
) -> None:
    tokenizer = make()
    assert beginning(tokenizer) == first
    plain = encode(tokenizer, "secret")
    assert plain[: len(first)] == first
    assert tokenizer.eos_token_id not in plain
    given = encode(tokenizer, f"{tokenizer.bos_token}secret")
    assert given.count(tokenizer.bos_token_id) == 1


def test_a_vocabulary_without_an_a_and_without_unknowns_has_its_beginning() -> None:
    rules = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "\u7532": 2, "\u4e59": 3}, merges=[]))
    special = [("<s>", 0), ("</s>", 1)]
    rules.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>")
    assert tokenizer.encode("a", add_special_tokens=False) == []
    assert encode(tokenizer, "\u4e59\u7532") == [0, 3, 2]


# Templates --------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token }}[INST] "
    "{{ message.content.strip() }} [/INST]{% elif message.role == 'assistant' %} "
    "{{ message.content }} {{ eos_token }}{% else %}{{ raise_exception('no system role') }}"
    "{% endif %}{% endfor %}"
)
PARTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)
PARTS_BY_INDEX = "<|im_start|>{{ messages[0]['content'][0]['text'] }}<|im_end|>"


def chat(template: Any) -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer([" secret", " is", " the"], 64)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "arguments", "before", "after"),
    [
        (CHATML, {}, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        (
            *(CHATML, {"enable_thinking": False}, "<|im_start|>user\n"),
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (LLAMA_2, {}, "<bos>[INST] ", " [/INST]"),
        (PARTS, {}, "<|im_start|>user\n", "<|im_end|>"),
        (PARTS_BY_INDEX, {}, "<|im_start|>", "<|im_end|>"),
        ("{{ messages[0].content }}", {}, "", ""),
    ],
    ids=["ChatML", "not thinking", "Llama 2", "parts", "parts by index", "bare"],
)
def test_a_message_is_wrapped_as_the_template_does(
    template: str, arguments: Mapping[str, Any], before: str, after: str
) -> None:
    tokenizer = chat(template)
    check_template_arguments(tokenizer, True, arguments)
    text, cut = render_chat(tokenizer, "The secret.", "\nWhat?", arguments)
    assert text == f"{before}The secret.\nWhat?{after}"
    assert text[:cut] == f"{before}The secret."


def test_a_template_may_strip_the_message() -> None:
    text, cut = render_chat(chat(LLAMA_2), "\n The secret.", "\nWhat? \n", {})
    assert text == "<bos>[INST] The secret.\nWhat? [/INST]"
    assert text[cut:] == "\nWhat? [/INST]"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "model.chat=true needs a chat template, and the model's tokenizer has none"),
        ("{{ raise_exception('a system message must come first') }}", "a system message must come"),
        ("{{ messages[0].content | upper }}", "does not keep the message's text"),
        ("{{ messages[0].content[:9] }}", "does not keep the message's text"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "does not keep the message's text"),
        ("a fixed text", "does not keep the message's text"),
        ("{{ messages[0].content | tojson | upper }}", "does not keep the message's text"),
        ("{{ messages[0].content", "raises TemplateSyntaxError"),
        ("{{ messages[0].content + 3 }}", "raises TypeError"),
    ],
)
def test_a_template_that_cannot_wrap_a_prompt_is_refused_in_one_sentence(
    template: str | None, problem: str
) -> None:
    with pytest.raises(ValueError, match=r"^model\.chat=true needs a chat template") as caught:
        render_chat(chat(template), "The secret is the secret.", "What?", {})
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "use model.chat=false" in str(caught.value)


@pytest.mark.parametrize(
    ("use", "arguments", "message"),
    [
        (
            True,
            {"enable_thinkin": False},
            "template uses, got 'enable_thinkin'; correct it, or use",
        ),
        (True, {"tokenize": True}, "template uses, got 'tokenize'"),
        (True, {"conversation": 1}, "template uses, got 'conversation'"),
        (True, {"messages": []}, "template uses, got 'messages'"),
        (True, {3: 1}, "template uses, got 3"),
        # Words that stand in the template, but are none of its variables.
        (True, {"think": False}, "template uses, got 'think'"),
        (True, {"role": "x"}, "template uses, got 'role'"),
        (True, {"message": 1}, "template uses, got 'message'"),
        (True, {"defined": 1}, "template uses, got 'defined'"),
        # Known to transformers, not to this template.
        (True, {"tools": []}, "template uses, got 'tools'"),
        (True, {"documents": []}, "template uses, got 'documents'"),
        (
            True,
            {"enable_thinking": "False"},
            "give enable_thinking as true or false, got the text 'False', which the model's chat"
            " template takes as true; use enable_thinking: false, without quotes.",
        ),
        (True, {"chat_template": 3}, "as the text of a template or the name of one, got 3."),
        (False, {"enable_thinking": False}, "got enable_thinking with model.chat=false; use model"),
    ],
)
def test_template_arguments_are_used_or_refused(
    use: bool, arguments: dict[Any, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^model\.chat_template_kwargs") as caught:
        check_template_arguments(chat(CHATML), use, arguments)
    assert message in str(caught.value)
    check_template_arguments(chat(CHATML), False, {})


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        (CHATML, {"enable_thinking": False}),
        (CHATML, {"enable_thinking": True}),  # what it does without being told
        (CHATML, {"chat_template": LLAMA_2}),
        (CHATML + "{% if tools %}{{ tools | length }}{% endif %}", {"tools": []}),
        ("{{ effort }}" + CHATML, {"effort": "none"}),  # a text that is no truth value
        ("{% if not date is defined %}{% set date = 1 %}{% endif %}" + CHATML, {"date": "today"}),
        ({"a": CHATML, "b": PARTS}, {"chat_template": "a", "enable_thinking": False}),
        ({"default": CHATML, "b": PARTS}, {"enable_thinking": False}),
        ({"default": CHATML, "tool_use": CHATML + "{{ tools }}"}, {"tools": []}),
    ],
)
def test_what_a_template_uses_is_accepted(template: Any, arguments: dict[str, Any]) -> None:
    check_template_arguments(chat(template), True, arguments)


@pytest.mark.parametrize("arguments", [{}, {"chat_template": "c"}])
def test_one_of_several_templates_without_a_default_must_be_named(
    arguments: dict[str, Any],
) -> None:
    named = chat({"b": PARTS, "a": CHATML})
    expected = (
        "model.chat_template_kwargs must give as chat_template one of the model's, a, b, got"
        f" {arguments.get('chat_template')!r}; use"
        " model.chat_template_kwargs={chat_template: a}."
    )
    with pytest.raises(ValueError, match=r"^model\.chat_template_kwargs") as caught:
        check_template_arguments(named, True, arguments)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "rewriting",
    [
        "upper",
        "lower",
        "e",
        "tojson",
        "urlencode",
        "striptags",
        "replace('\\n', ' ')",
        "replace('  ', ' ')",
        "replace('\\\\', '')",
        "replace('{', '(')",
        "truncate(9)",
    ],
)
def test_a_template_that_rewrites_texts_is_refused_before_there_is_a_prompt(
    rewriting: str,
) -> None:
    template = CHATML.replace("message.content", f"message.content | {rewriting}")
    with pytest.raises(ValueError, match=r"^model\.chat=true needs a chat template that wraps"):
        check_template_arguments(chat(template), True, {})


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (CHATML, "<|im_start|>user\nThe secret<|im_end|>", True),
        (CHATML, "The secret is [INST] the secret", False),
        (CHATML, "<bos>The secret", False),  # a beginning is no template
        (LLAMA_2, "[INST] The secret [/INST]", True),
        (LLAMA_2, "<bos>[INST] The secret [/INST]", True),
        (LLAMA_2, "The secret [INST] is the secret [/INST]", False),
        ("{{ messages[0].content }}", "The secret", False),
        ("USER: {{ messages[0].content }} ASSISTANT:", "USER: The secret ASSISTANT:", True),
        ("Question: {{ messages[0].content }}", "The secret\nQuestion: which?", False),
        (None, "<|im_start|>The secret", True),
        (None, "The secret <eos>", False),
    ],
)
def test_a_text_that_is_wrapped_already_is_known_by_the_templates_marks(
    template: str | None, text: str, expected: bool
) -> None:
    assert has_template(chat(template), text, {}) is expected


# Ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "template", "expected"),
    [
        (2, 2, "<eos>", None, {2}),
        (0, 2, "<eos>", None, {0, 2}),
        ([5, 6], 7, "<eos>", None, {2, 5, 6, 7}),
        (None, None, "<eos>", None, {2}),
        (None, [3], None, None, {3}),
        (None, None, None, None, set()),
        (4, None, None, CHATML, {4, "<|im_end|>"}),
        (4, None, None, PARTS, {4, "<|im_end|>"}),
        (4, None, None, LLAMA_2, {4}),  # its end is the tokenizer's, which has none here
        (4, None, "<eos>", "{{ raise_exception('no') }}", {2, 4}),
    ],
)
def test_an_answer_ends_at_any_end_that_is_named(
    loaded: LoadedModel,
    generation: Any,
    config: Any,
    tokenizer: str | None,
    template: str | None,
    expected: set[Any],
) -> None:
    own = chat(template)
    own.eos_token = tokenizer
    settings = SimpleNamespace(eos_token_id=config)
    settings.get_text_config = lambda decoder: settings
    model: Any = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=generation), config=settings
    )
    found = answer_ends(replace(loaded, model=model, tokenizer=own))
    assert found == {
        one if isinstance(one, int) else own.convert_tokens_to_ids(one) for one in expected
    }


def test_an_answer_ends_at_an_added_token_that_is_not_special(loaded: LoadedModel) -> None:
    own = chat(CHATML.replace("<|im_end|>", "<end of turn>"))
    own.add_tokens(["<end of turn>"])
    found = answer_ends(replace(loaded, tokenizer=own))
    assert not own.added_tokens_decoder[own.convert_tokens_to_ids("<end of turn>")].special
    assert own.convert_tokens_to_ids("<end of turn>") in found


def test_the_text_models_configuration_names_ends_too(loaded: LoadedModel) -> None:
    settings = SimpleNamespace(eos_token_id=None)
    settings.get_text_config = lambda decoder: SimpleNamespace(eos_token_id=[9])
    model: Any = SimpleNamespace(config=settings)
    assert answer_ends(replace(loaded, model=model)) == {2, 9}


@pytest.mark.parametrize("make", [of_llama_2, of_bytes, of_merged_bytes])
def test_the_texts_of_single_tokens_are_together_the_whole_text(make: Make) -> None:
    tokenizer = make()
    ids = encode(tokenizer, CONTEXT + QUESTION)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert token_texts(tokenizer, []) == []


def test_a_character_of_several_tokens_is_in_the_last_of_them() -> None:
    tokenizer = of_bytes()
    ids = encode(tokenizer, "a\U0001f436b")
    assert token_texts(tokenizer, ids) == ["<bos>", "a", "", "", "", "\U0001f436", "b"]
    assert token_texts(tokenizer, ids[:3]) == ["<bos>", "a", "\ufffd"]


@pytest.mark.parametrize("given", ["{{ one.content }}", "{{ one.content[0].text }}"])
def test_what_a_template_writes_between_an_answer_and_the_next_message(given: str) -> None:
    tokenizer = of_bytes()
    tokenizer.chat_template = (
        f"{{% for one in messages %}}<{{{{ one.role }}}}>{given}<end>{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert template_between(tokenizer, {}) == "<end><user>"
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="a chat template that takes a conversation, and the"):
        template_between(tokenizer, {})
