"""How a text reaches a model: its chat template, its tokens, and the tokens that end an answer."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

if TYPE_CHECKING:
    from topkbench.models.load import LoadedModel

TODAY = datetime(2024, 7, 26)
"""The date that a template writes (those of Llama 3.2, SmolLM3 and gpt-oss do), on every day.

Prompts would otherwise change from day to day. Llama 3.2's writes this one where it cannot ask.
"""
_PROBE = "\u241e"  # stands for a message where only the template around it matters
# What a template may rewrite: it upper-cases, quotes, escapes, joins lines or removes marks.
_MIXED_PROBE = "Aa \"b\" 'c' <d> & {e}\n\nf  g \\ \u00e9 " + _PROBE
# Parameters of transformers' ``apply_chat_template`` that are variables of the template.
_PASSED_ON = ("tools", "documents")
_WORDS_FOR_FALSE = ("false", "no", "off", "none", "null", "0")


# Tokens ------------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text, after the tokens that the tokenizer puts before every text.

    Those are put in by id, and only if the text does not begin with them itself. What a tokenizer
    puts after a text, such as its end token, is left out: the model is to continue the text.
    """
    ids, _ = encode_split(tokenizer, text, len(text))
    return ids


def encode_split(
    tokenizer: PreTrainedTokenizerBase, text: str, cut: int, begin: bool = True
) -> tuple[list[int], list[int]]:
    """Encode a text as a whole, then cut its tokens in two where the text is cut.

    Encoding the two parts of the text apart would give other tokens: some tokenizers put a piece of
    their own before every text. A token with characters on both sides belongs to the second part,
    so that the first contains nothing of what follows the cut.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        cut: Number of characters before the cut.
        begin: Whether to put the tokenizer's beginning tokens before the text; false for a text
            that is complete, as a rendered chat template is.

    Returns:
        The tokens before and after the cut; together they are the tokens of the whole text.
    """
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(found["input_ids"])
        # Several tokens may share a character; all of them end at the same place.
        ends = [end for _, end in found["offset_mapping"]]
        place = next((place for place, end in enumerate(ends) if end > cut), len(ids))
    else:  # without offsets: the tokens that do not depend on what follows the cut
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        before = tokenizer.encode(text[:cut], add_special_tokens=False)
        pairs = enumerate(zip(ids, before, strict=False))
        differing = (place for place, (one, other) in pairs if one != other)
        place = next(differing, min(len(ids), len(before)))
    first = beginning(tokenizer) if begin else []
    if ids[: len(first)] == first:
        first = []
    return first + ids[:place], ids[place:]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before every text; none for some tokenizers."""
    for text in _short_texts(tokenizer):
        plain = tokenizer.encode(text, add_special_tokens=False)
        if not plain:
            continue
        whole = tokenizer.encode(text, add_special_tokens=True)
        for place in range(len(whole) - len(plain) + 1):
            if whole[place : place + len(plain)] == plain:
                return list(whole[:place])
        return []
    return []


def _short_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield "a"
    # Some vocabularies have no letter "a", and nothing that stands for what they lack. Only those
    # are read, since a large one takes longer than encoding a prompt.
    special = set(tokenizer.all_special_tokens)
    yield from (piece for piece in tokenizer.get_vocab() if piece not in special)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to those before it; together they are the whole text.

    Of a character that is made of several tokens, the last one has it and the others are empty.
    """

    def text(first: int, end: int) -> str:
        found = tokenizer.decode(
            list(ids[first:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(found)

    texts: list[str] = []
    # A token is decoded after the one before it, which shows whether a blank comes between.
    first = shown = 0
    for end in range(1, len(ids) + 1):
        whole = text(first, end)
        if whole.endswith("\ufffd") and end < len(ids):  # a part of a character
            texts.append("")
            continue
        texts.append(whole[len(text(first, shown)) :])
        first, shown = shown, end
    return texts


# Chat templates ----------------------------------------------------------------------------------


def check_template_arguments(
    tokenizer: PreTrainedTokenizerBase, chat: bool, arguments: Mapping[str, Any]
) -> None:
    """Check that a tokenizer's chat template can be used as the settings of its model ask.

    Args:
        tokenizer: The tokenizer.
        chat: Whether prompts are wrapped in its chat template.
        arguments: The arguments of the template.

    Raises:
        ValueError: If there is no template, it does not use an argument, takes a text such as
            "false" as true, or cannot wrap a message as it is.
    """
    if arguments and not chat:
        raise ValueError(
            "model.chat_template_kwargs needs prompts in the chat template, got"
            f" {', '.join(map(str, arguments))} with model.chat=false; use model.chat=true, or"
            " model.chat_template_kwargs=null."
        )
    if not chat:
        return
    template = _template(tokenizer, arguments)
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters) - set(_PASSED_ON)
    try:
        variables = meta.find_undeclared_variables(
            _compile_jinja_template(template).environment.parse(template)
        )
    except TemplateError:  # it is named where the template is rendered
        variables = set(arguments)
    for name in arguments:
        if name != "chat_template" and name not in variables - own - {"messages"}:
            raise ValueError(
                "model.chat_template_kwargs must be arguments that the model's chat template uses,"
                f" got {name!r}; correct it, or use model.chat_template_kwargs=null."
            )
    render_chat(tokenizer, _MIXED_PROBE, "", arguments)
    for name, value in arguments.items():
        if not isinstance(value, str) or value.strip().lower() not in _WORDS_FOR_FALSE:
            continue
        as_text, as_true, as_false = (
            template_around(tokenizer, {**arguments, name: one}) for one in (value, True, False)
        )
        if as_text == as_true != as_false:
            raise ValueError(
                f"model.chat_template_kwargs must give {name} as true or false, got the text"
                f" {value!r}, which the model's chat template takes as true; use {name}: false,"
                " without quotes."
            )


def render_chat(
    tokenizer: PreTrainedTokenizerBase, context: str, question: str, arguments: Mapping[str, Any]
) -> tuple[str, int]:
    """Return a user's message in the chat template, up to where the assistant's answer begins.

    The message is passed as a text; if the template does not take it so, as a list of parts.

    Args:
        tokenizer: The tokenizer, which has a chat template.
        context: The message up to the cut.
        question: The rest of the message.
        arguments: The arguments of the template.

    Returns:
        The rendered text, and the number of its characters before the cut.

    Raises:
        ValueError: If there is no template, it raises, or it changes the message; it may strip
            white space around it.
    """
    _template(tokenizer, arguments)
    message = context + question
    leading = len(message) - len(message.lstrip())
    problems = []
    for content in _contents(message):
        try:
            text = _rendered(tokenizer, [("user", content)], arguments, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises; it is not our code
            problems.append(f"raises {type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        for body, cut in ((message, len(context)), (message.strip(), len(context) - leading)):
            # A list that is written out instead of read is no rendering of the message.
            before = text.partition(body)[0]
            if text.count(body) == 1 and not re.search(r"""["']text["']: ?["']$""", before):
                return text, len(before) + min(max(cut, 0), len(body))
        problems.append("does not keep the message's text, once and unchanged")
    raise ValueError(
        "model.chat=true needs a chat template that wraps one message of the user, but the model's"
        f" {problems[0].rstrip('.')}; use model.chat=false, or set model.chat_template_kwargs."
    )


def has_template(
    tokenizer: PreTrainedTokenizerBase, text: str, arguments: Mapping[str, Any]
) -> bool:
    """Return whether a text is wrapped in a chat template already.

    It is if it contains a special token that the tokenizer's template writes around a message. If
    the template writes none, it is if it begins and ends like a text of the template. If there is
    no template, any special token counts, except those for beginning, end, padding and unknowns.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.discard(str(tokenizer.bos_token))
    try:
        rendered, end = render_chat(tokenizer, _PROBE, "", arguments)
    except ValueError:
        plain = (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        return any(token in text for token in special - set(map(str, plain)))
    before, after = rendered[: end - len(_PROBE)], rendered[end:]
    markers = [token for token in special if token in before + after]
    if markers:
        return any(token in text for token in markers)
    bos = str(tokenizer.bos_token or "")
    first, last = before.removeprefix(bos).split(), after.split()
    own = text.removeprefix(bos).lstrip()
    if first and last:
        return own.startswith(first[0]) and last[-1] in own
    return bool(first or last) and own.startswith(" ".join(first)) and " ".join(last) in own


def template_around(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> list[str]:
    """Return what the chat template writes before and after a user's message."""
    rendered, end = render_chat(tokenizer, _PROBE, "", arguments)
    return [rendered[: end - len(_PROBE)], rendered[end:]]


def template_between(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    """Return what the chat template writes between an answer and the user's next message.

    Raises:
        ValueError: If it does not take a conversation of several messages.
    """
    answer, second = f"{_PROBE}a", f"{_PROBE}b"
    asked, answered, again = map(_contents, (_PROBE, answer, second))
    for one, two, three in zip(asked, answered, again, strict=True):
        messages = [("user", one), ("assistant", two), ("user", three)]
        try:
            text = _rendered(tokenizer, messages, arguments, add_generation_prompt=True)
        except Exception:  # whatever a template raises; it may take the other form
            continue
        _, found, after = text.partition(answer)
        between, found_second, _ = after.partition(second)
        if found and found_second:
            return between
    raise ValueError(
        "several questions need a chat template that takes a conversation, and the model's takes"
        " one message only; use model.chat=false."
    )


def _template(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    """Return the text of the chat template that the arguments choose.

    Raises:
        ValueError: If there is none.
    """
    named, chosen = tokenizer.chat_template, arguments.get("chat_template")
    if not named and not chosen:
        raise ValueError(
            "model.chat=true needs a chat template, and the model's tokenizer has none; use"
            " model.chat=false."
        )
    if chosen is not None and not isinstance(chosen, str):
        raise ValueError(
            "model.chat_template_kwargs must give chat_template as the text of a template or the"
            f" name of one, got {chosen!r}."
        )
    try:
        template: str | None = tokenizer.get_chat_template(chosen, arguments.get("tools"))
    except ValueError:  # several, and none of them is the default
        template = None
    if isinstance(named, dict) and (template is None or (template == chosen and "{" not in chosen)):
        raise ValueError(
            "model.chat_template_kwargs must give as chat_template one of the model's,"
            f" {', '.join(sorted(named))}, got {chosen!r}; use model.chat_template_kwargs="
            f"{{chat_template: {min(named)}}}."
        )
    return str(template)


def _contents(message: str) -> tuple[Any, Any]:
    """Return a message in the two forms that templates take: a text, and a list of parts."""
    return message, [{"type": "text", "text": message}]


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[tuple[str, Any]],
    arguments: Mapping[str, Any],
    add_generation_prompt: bool,
) -> str:
    # Transformers keeps compiled templates, and passes no function on to them.
    variables = _compile_jinja_template(_template(tokenizer, arguments)).globals
    before = variables["strftime_now"]
    variables["strftime_now"] = TODAY.strftime
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **arguments,
            )
        )
    finally:
        variables["strftime_now"] = before


# Ends --------------------------------------------------------------------------------------------


def answer_ends(loaded: "LoadedModel") -> frozenset[int]:
    """Return the tokens that end an answer.

    They are all that the generation settings, the model's configuration and the tokenizer name as
    end tokens, and the token that the chat template writes after an answer, if it is a special or
    an added one: a chat model ends its turn with it also where it is asked without the template.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    config = model.config
    named = [
        getattr(source, "eos_token_id", None)
        for source in (
            getattr(model, "generation_config", None),
            config,
            config.get_text_config(decoder=True),
        )
    ]
    if isinstance(tokenizer, PreTrainedTokenizerBase):  # a model of random weights has none
        named += [tokenizer.eos_token_id, _turn_end(tokenizer, loaded.chat_template_kwargs)]
    ends: set[int] = set()
    for ids in named:
        if ids is not None:
            ends |= {ids} if isinstance(ids, int) else {int(one) for one in ids}
    return frozenset(ends)


def _turn_end(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> int | None:
    """Return the special or added token that the template writes after an answer, or None."""
    if not tokenizer.chat_template and not arguments.get("chat_template"):
        return None
    for asked, answered in zip(_contents("a"), _contents(_PROBE), strict=True):
        try:
            text = _rendered(
                tokenizer, [("user", asked), ("assistant", answered)], arguments, False
            )
        except Exception:  # a template that takes no such conversation names no end
            continue
        _, found, after = text.rpartition(_PROBE)
        after = after.lstrip()
        follows = {
            str(token): number
            for number, token in tokenizer.added_tokens_decoder.items()
            if found and str(token).strip() and after.startswith(str(token))
        }
        if follows:
            return follows[max(follows, key=len)]
    return None
