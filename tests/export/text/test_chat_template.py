"""Chat templates as data: found, checked, and refused where they are more than text around."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.text.chat_template import PROBES, chat_record
from runtime.bundle.tokenizer_file import EXPRESSIONS, TEKKEN, TIKTOKEN
from runtime.tokenizer import TextTokenizer
from tests.tiny.flux2 import LENGTH, mistral_tokenizer, qwen3_tokenizer

FLAGS = {"add_generation_prompt": True, "enable_thinking": False}


def message(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_what_stands_around_a_prompt() -> None:
    record = chat_record(qwen3_tokenizer(), LENGTH, message, **FLAGS)
    assert record == {
        "before": "<|im_start|>user\n",
        "after": "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "padding_side": "right",
        "special_tokens": True,
        "removed": [],
    }
    plain = chat_record(qwen3_tokenizer(), LENGTH, message)
    assert plain["after"] == "<|im_end|>\n"  # the template's options count


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_runtime_tokenizes_as_transformers_does(side: str, tmp_path: Path) -> None:
    """Prompts that hold the template's own tokens, or none at all; padding on either side."""
    tokenizer = mistral_tokenizer(side)
    record = chat_record(tokenizer, LENGTH, message, removed=("[IMG]",), special_tokens=False)
    tokenizer.save_pretrained(tmp_path)
    spec = record | {"max_length": LENGTH, "pad_id": tokenizer.pad_token_id}
    ours = TextTokenizer("tokenizer", tmp_path / "tokenizer.json", spec)
    prompts = [*PROBES, "a red [IMG] circle", "</s>[INST] You two"]
    ids, masks = ours.tokens(prompts)
    theirs = tokenizer.apply_chat_template(
        [message(prompt.replace("[IMG]", "")) for prompt in prompts],
        tokenize=True,
        return_dict=True,
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
    )
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    np.testing.assert_array_equal(masks, theirs["attention_mask"])
    assert masks[0].sum() < LENGTH and (masks[0, 0] == 0) == (side == "left")
    clause = ours.truncation(PROBES[-1])
    assert clause is not None and clause.startswith(f"tokenizer reads {LENGTH} tokens; the last")


def test_a_template_that_strips(tmp_path: Path) -> None:
    tokenizer = qwen3_tokenizer()
    tokenizer.chat_template = "{{ '<|im_start|>' + messages[0].content | trim + '<|im_end|>' }}"
    record = chat_record(tokenizer, LENGTH, message)
    assert record["stripped"] is True and record["after"] == "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].content | upper }}", "changes the prompt ''|changes the prompt 'a red"),
        ("{{ messages[0].content[:20] }}x", "changes the prompt"),
        ("no prompt at all", "changes the prompt ''"),
        (
            "{{ messages[0].content if '%}' not in messages[0].content else 'no' }}",
            r"changes the prompt '\{\{ braces",
        ),
    ],
)
def test_a_template_that_is_more_is_refused(template: str | None, words: str) -> None:
    tokenizer = qwen3_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=words):
        chat_record(tokenizer, LENGTH, message)


def test_a_manifest_with_a_broken_template_is_refused() -> None:
    from runtime.bundle.manifest import check_template

    good = {"before": "a\n", "after": "", "removed": ["x"], "padding_side": "left"}
    check_template(good | {"special_tokens": False, "stripped": True}, "here")
    for wrong, words in (
        ({"before": 1}, "here.before .* is 1, expected a text"),
        ({"after": "x" * 10_001}, "here.after"),
        ({"removed": [""]}, "here.removed .* expected texts"),
        ({"removed": "x"}, "here.removed"),
        ({"padding_side": "top"}, "here.padding_side"),
        ({"special_tokens": 1}, "here.special_tokens .* is 1, expected true or false"),
    ):
        with pytest.raises(ValueError, match=words):
            check_template(good | wrong, "here")


def test_mistrals_expressions_may_be_run() -> None:
    """Both that tokenizers of it may have: transformers repairs the second into the first."""
    import importlib
    import inspect

    # Of the module: where sentencepiece is missing the package has a stand-in of that name.
    for expression, name in (
        (TEKKEN, "tokenization_utils_tokenizers"),
        (TIKTOKEN, "convert_slow_tokenizer"),
    ):
        source = inspect.getsource(importlib.import_module(f"transformers.{name}"))
        assert expression in source and expression in EXPRESSIONS
    held = json.loads(mistral_tokenizer().backend_tokenizer.to_str())["pre_tokenizer"]
    assert held["pretokenizers"][0]["pattern"]["Regex"] in EXPRESSIONS
