"""The tokenizer of the shipped model: known words are one token, other text becomes bytes."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
MAX_VOCAB_SIZE = 4096


def build_tokenizer(words: Iterable[str], window: int) -> PreTrainedTokenizerFast:
    """Return a lossless tokenizer in which each of ``words`` is one token.

    A byte-level BPE without merges that looks up whole pieces: a word with its leading space, one
    or two digits, or a run of punctuation. A piece outside the vocabulary is split into bytes, so
    every text can be encoded and decoded exactly.

    Args:
        words: Pieces that become one token, with their leading space if they have one.
        window: The longest sequence of the model, in tokens.

    Raises:
        ValueError: If the vocabulary would exceed 4,096 entries.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [byte_level.pre_tokenize_str(word)[0][0] for word in words]
    digits = [f"{number:02d}" for number in range(100)]
    pieces += [*digits, *(f"Ġ{number}" for number in (*range(10), *digits))]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    if len(vocabulary) > MAX_VOCAB_SIZE:
        raise ValueError(
            f"the vocabulary must hold at most {MAX_VOCAB_SIZE} entries, got {len(vocabulary)};"
            " pass fewer words."
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d{1,2}"), "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=window,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
