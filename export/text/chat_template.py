"""A tokenizer's chat template as data: what it writes before and after one message of a user.

Templates are programs (Jinja), and a bundle has none: the runtime sets fixed texts around a prompt.
What these are is found by rendering, and held against the template and the tokenizer on prompts
that would show a difference; a template that does anything else with a prompt is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MARK = "d2m-marks-the-prompt"
PROBES = (
    "",
    "a red circle",
    "  spaces at both ends  ",
    "\nlines\n\nand lines\n",
    "{{ braces }} {% if x %}y{% endif %} {# z #}",
    "<|im_end|> </s> [/INST] <think>",
    "\u00e9\u732b\U0001f98a 'quotes' \"and\" \\n & <b>",
    " ".join(f"word{number}" for number in range(600)),
)


def chat_record(
    tokenizer: Any,
    length: int,
    messages: Callable[[str], list[dict[str, Any]]],
    *,
    removed: Sequence[str] = (),
    special_tokens: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """What a tokenizer's record in the manifest says of its template: see runtime.tokenizer.

    Args:
        tokenizer: transformers', fast, with a chat template.
        length: tokens that prompts are padded and cut to, the template's among them.
        messages: prompt -> the messages that the template is given.
        removed: texts that prompts lose before.
        special_tokens: whether the tokenizer adds its own to what the template wrote.
        options: of the template, such as add_generation_prompt.

    ValueError, one sentence, where the template is none, or more than text around a prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, expected one (in"
            " tokenizer_config.json or chat_template.jinja); take the tokenizer of the pipeline as"
            " it was published."
        )

    def rendered(prompt: str) -> str:
        for each in removed:
            prompt = prompt.replace(each, "")
        text: str = tokenizer.apply_chat_template(messages(prompt), tokenize=False, **options)
        return text

    before, found, after = rendered(MARK).partition(MARK)
    record = {"before": before, "after": after, "padding_side": tokenizer.padding_side}
    record |= {"special_tokens": special_tokens, "removed": list(removed)}
    stripped = rendered(" x ") == f"{before}x{after}"
    record |= {"stripped": True} if stripped else {}
    for prompt in PROBES:
        plain = prompt.strip() if stripped else prompt
        if not found or rendered(prompt) != f"{before}{plain}{after}":
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} changes the prompt {prompt[:40]!r},"
                " expected fixed text around every prompt: a bundle runs no templates; take the"
                " template that the pipeline was published with."
            )
    check_ids(tokenizer, length, record, [rendered(prompt) for prompt in PROBES])
    return record


def check_ids(tokenizer: Any, length: int, record: dict[str, Any], texts: Sequence[str]) -> None:
    """ValueError unless the runtime's ids and masks of PROBES are transformers' of `texts`."""
    import numpy as np

    from runtime.tokenizer import TextTokenizer

    expected = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=length,
        add_special_tokens=record["special_tokens"],
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(tokenizer.backend_tokenizer.to_str(pretty=False), encoding="utf-8")
        spec = record | {"max_length": length, "pad_id": tokenizer.pad_token_id}
        ids, masks = TextTokenizer("tokenizer", file, spec).quiet(PROBES)
    same = np.array_equal(ids, expected["input_ids"])
    if not same or not np.array_equal(masks, expected["attention_mask"]):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} gives other ids than its tokenizer.json, which"
            " a bundle has; save it again with transformers 4.56 or later."
        )
