"""Small tokenizers of every kind that students have, trained in a moment, and texts that are hard on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TRAINING = [
    "the teacher learns 12 345 of the cache,  and a student\n\tnaïve café \U0001f600 hello Hello world"
] * 4
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
META = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
HARD = [
    "\U0001f600",
    "\U0001f469\u200d\U0001f680",  # two characters joined
    "\U0001f1e9\U0001f1ea",  # a flag
    "\U0001f44d\U0001f3fd",
    "e\u0301\u0323",  # combining marks
    "\u0915\u094d\u0937\u093f",
    "שלום",
    "\u202eمرحبا\u202c",
    "你好",
    "12345",
    "٣٤",
    "½ﬁ①",
    "  ",
    "     ",
    "\t",
    "\n\n",
    "\r\n",
    "\u00a0\u3000",
    "\x00",
    "\x07\x1b",
    "\ufeff",
    "\u2028",
    "Ġ",
    "##ing",
    "<0x41>",
    "</s>",
    "<s>",
    "<unk>",
    "[SEP]",
    "<|im_end|>",
    "<|im_start|>user\n",
    "hello",
    " hello",
    "Hello ",
    "the",
    " world",
    "İ",
    "ẞ",
    "don't",
]
# Where "▁" stands for the space, it is one itself; everything else comes back.
characters = st.characters(codec="utf-8", exclude_characters="▁")
hard_texts = st.lists(st.sampled_from(HARD) | characters | st.text("ab 1\n", max_size=4), max_size=8).map(
    "".join
)


def fast(tokenizer: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_bpe(normalizer: Any = None, size: int = 300) -> Any:
    """As GPT-2, but digits stand alone and white space is not cut; <s> in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"\w+|\s+|[^\w\s]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return fast(tokenizer, bos_token="<s>", eos_token="</s>")


def bytes_alone() -> Any:
    """256 bytes and no special token at all."""
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(sorted(ALPHABET))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def gaps() -> Any:
    """As GPT-2 without the tokens of some bytes, which it drops."""
    vocabulary = {letter: n for n, letter in enumerate(sorted(ALPHABET)) if letter not in "eÃĠ"}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def pieces_bpe(scheme: str) -> Any:
    """As Llama 2 ("prepend"), Mistral ("first", "always") and Gemma ("never")."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=360, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"]
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return _with_bytes(tokenizer, scheme)


def _with_bytes(tokenizer: Tokenizer, scheme: str) -> Any:
    """The tokens of bytes are in the vocabulary and not among the added ones, as in converted checkpoints."""
    import json

    config = json.loads(tokenizer.to_str())
    vocabulary = config["model"]["vocab"]
    letters = "▁abcdefghijklmnopqrstuvwxyz<>/s0x4"
    vocabulary |= {
        name: len(vocabulary) + n
        for n, name in enumerate(n for n in [*BYTES, *letters] if n not in vocabulary)
    }
    tokenizer = Tokenizer.from_str(json.dumps(config))
    return _metaspace(tokenizer, scheme)


def _metaspace(tokenizer: Tokenizer, scheme: str) -> Any:
    if scheme in ("prepend", "never"):
        replace = normalizers.Replace(" ", "▁")
        prepend = [normalizers.Prepend("▁")] if scheme == "prepend" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, replace])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = META
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(scheme: str, byte_fallback: bool = True) -> Any:
    """As T5 and Gemma's SentencePiece; special tokens are pieces as good as any."""
    words = ["▁the", "▁hello", "he", "llo", "▁student", "er", "ing", "▁world", "é", "▁▁"]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((name, -20.0) for name in BYTES)]
    vocabulary += [(word, -4.0) for word in words] + [(letter, -6.0) for letter in "▁abcdehlnorstuw12<>/\n"]
    tokenizer = Tokenizer(
        models.Unigram(
            vocabulary if byte_fallback else [v for v in vocabulary if v[0] not in BYTES], 0, byte_fallback
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _metaspace(tokenizer, scheme)


def word_piece() -> Any:
    """As BERT, in lower case and without accents."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.decoder = decoders.WordPiece()
    around = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return fast(tokenizer, **names)


EXACT: dict[str, Callable[[], Any]] = {
    "byte_bpe": byte_bpe,
    "bytes": bytes_alone,
    "bpe_prepend": lambda: pieces_bpe("prepend"),
    "bpe_first": lambda: pieces_bpe("first"),
    "bpe_always": lambda: pieces_bpe("always"),
    "bpe_never": lambda: pieces_bpe("never"),
    "unigram_first": lambda: unigram("first"),
    "unigram_always": lambda: unigram("always"),
    "unigram_never": lambda: unigram("never"),
}
LOSSY: dict[str, Callable[[], Any]] = {
    "word_piece": word_piece,
    "nfkc": lambda: byte_bpe(normalizers.NFKC()),
    "nfd": lambda: byte_bpe(normalizers.NFD()),
    "lowercase": lambda: byte_bpe(normalizers.Lowercase()),
    "unknown": lambda: unigram("first", byte_fallback=False),
    "gaps": gaps,
}


@cache
def made(kind: str) -> Any:
    """The tokenizer of a kind; made once."""
    return (EXACT | LOSSY)[kind]()


def with_specials(tokenizer: Any, special: list[str], **roles: str) -> Any:
    """The tokenizer with more special tokens, and with these roles."""
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    return tokenizer
