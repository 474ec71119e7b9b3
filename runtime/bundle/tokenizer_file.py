"""A tokenizer.json checked as data before the tokenizers library opens it.

The library would run any regular expression on a prompt (some take for ever) and any chain of
replacements (sixty-four that double a text fill any memory). The families' tokenizers need a
handful of steps with known expressions; nothing else is let through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runtime.files.checked_json import parse_json, show

MAX_BYTES = 64 << 20  # T5's own has 2.4 million
MAX_STEPS = 16
MAX_TOKENS = 1 << 20
MAX_WORD = 1000  # characters of a replacement, a prefix, a token or its affix
GROWTH = 64  # times a text may become longer in all replacements together
MODELS = ("BPE", "Unigram", "WordLevel")
NORMALIZERS = set(
    "NFC NFD NFKC NFKD Nmt Lowercase Strip StripAccents Replace Precompiled Prepend".split()
)
SPLITTERS = set("Split ByteLevel Metaspace WhitespaceSplit Whitespace Punctuation Digits".split())
PROCESSORS = set("TemplateProcessing RobertaProcessing BertProcessing ByteLevel".split())
# Expressions of CLIP's tokenizer (slow and fast classes of several years) and of T5's.
CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Qwen2's. Of alternatives that begin alike none is tried twice over more than a run of spaces.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Mistral's from 2024 on, which it calls Tekken: runs of one kind of letters, of which no two
# neighbouring parts can share more than the letters that are neither large nor small.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What transformers' conversion of tiktoken's files writes, Mistral's among them (read).
TIKTOKEN = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
EXPRESSIONS = {r"\s+", r" {2,}", r"\s", CLIP, QWEN2, TEKKEN, TIKTOKEN} | {
    f"{start}|{end}|{CLIP}"
    for start, end in [
        (r"<\|startoftext\|>", r"<\|endoftext\|>"),
        (r"\<\|startoftext\|\>", r"\<\|endoftext\|\>"),
        ("<|startoftext|>", "<|endoftext|>"),
    ]
}


def check_tokenizer(data: bytes) -> str:
    """The text of a tokenizer.json that may be handed to the library.

    Raises ValueError, a clause, where it asks for what FLUX's tokenizers do not.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    check(parse_json(data))
    return data.decode("utf-8")


def check(value: Any) -> None:
    """`check_tokenizer` for the parsed JSON."""
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise ValueError("it is no object with a model")
    one(value["model"], MODELS, "a model")
    if value["model"].get("dropout"):
        raise ValueError("its model drops merges at random")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        short(value["model"].get(name) or "", name)
    tokens = value.get("added_tokens") or []
    if not isinstance(tokens, list) or len(tokens) > MAX_TOKENS:
        raise ValueError("its added_tokens are no list of tokens")
    # The library searches a Unigram's pieces by recursion: one of 200,000 characters ended the
    # process.
    vocab = value["model"].get("vocab")
    pieces = vocab if isinstance(vocab, (list, dict)) else ()
    longest = max((len(piece) for piece in map(piece_of, pieces)), default=0)
    if longest > MAX_WORD:
        raise ValueError(f"it has a token of {longest} characters, expected at most {MAX_WORD}")
    for token in tokens:
        short(token.get("content") if isinstance(token, dict) else None, "content of a token")
    growth = 1.0
    for step in steps(value.get("normalizer"), "normalizers"):
        if one(step, NORMALIZERS, "a normalizer") == "Replace":
            growth *= max(1, len(short(step.get("content"), "content")) / length(step))
        elif step["type"] == "Prepend":
            short(step.get("prepend"), "prepend")
    if growth > GROWTH:
        raise ValueError(f"its replacements make a text {growth:.0f} times as long")
    for step in steps(value.get("pre_tokenizer"), "pretokenizers"):
        if one(step, SPLITTERS, "a pre-tokenizer") == "Split":
            length(step)
    for step in steps(value.get("post_processor"), "processors"):
        one(step, PROCESSORS, "a post-processor")


def piece_of(entry: Any) -> str:
    """A token of a model's vocab: a key of BPE's, the first of a Unigram's pair."""
    found = entry[0] if isinstance(entry, list) and entry else entry
    return found if isinstance(found, str) else ""


def steps(value: Any, inside: str) -> Iterator[dict[str, Any]]:
    """The steps of a part: none, one, or a Sequence of them, which holds no other Sequence."""
    if value is None:
        return
    rows = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        rows = value.get(inside)  # type: ignore[assignment]
    if not isinstance(rows, list) or len(rows) > MAX_STEPS:
        raise ValueError(f"its {inside} are no list of at most {MAX_STEPS} steps")
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"a step of its {inside} is {show(row)}")
        yield row


def one(row: dict[str, Any], known: Any, what: str) -> str:
    """The type of a step, which must be known."""
    kind = row.get("type")
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"it has {what} of type {show(kind)}, which FLUX's tokenizers have not")
    return kind


def length(step: dict[str, Any]) -> int:
    """The least length of what a step's pattern finds; the pattern must be a known one."""
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and len(pattern) == 1:
        text, expression = pattern.get("String"), pattern.get("Regex")
        if isinstance(text, str) and text:
            return len(text)
        if isinstance(expression, str) and expression in EXPRESSIONS:
            return 1
    raise ValueError(f"it has the pattern {show(pattern)}, which FLUX's tokenizers have not")


def short(value: Any, name: str) -> str:
    """A text that is not long."""
    if not isinstance(value, str) or len(value) > MAX_WORD:
        raise ValueError(f"its {name} is {show(value)}, expected a short text")
    return value
