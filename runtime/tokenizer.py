"""Prompts to token ids with the `tokenizers` library, as transformers' fast tokenizers do it.

Pipelines pad and cut every prompt to one length, special tokens included. (Read:
FluxPipeline._get_*_embeds and its relatives.) A chat template is text around the prompt here: what
it renders for one message was found when the bundle was exported
(export/text/chat_template.py).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.tokenizer_file import check_tokenizer
from runtime.files.checked_json import printable

log = logging.getLogger("runtime")


class TextTokenizer:
    """A tokenizer.json as FluxPipeline uses it.

    `spec` is the manifest's record: max_length (tokens, special ones included) and pad_id, and
    where the model reads a template `before` and `after`, texts around every prompt, `removed`,
    texts that prompts lose, `stripped` (whether they lose spaces at their ends), `padding_side`,
    `special_tokens` (whether the tokenizer adds its own). `name` is "tokenizer" (CLIP's) or
    "tokenizer_2" (T5's), for messages.
    """

    def __init__(
        self,
        name: str,
        path: str | os.PathLike[str],
        spec: Mapping[str, Any],
        data: bytes | None = None,
    ) -> None:
        """`data` are the file's bytes where they were read before (and their hash was checked)."""
        from tokenizers import Tokenizer

        self.name = name
        self.max_length: int = spec["max_length"]
        self.around = spec.get("before", ""), spec.get("after", "")
        self.removed: tuple[str, ...] = tuple(spec.get("removed", ()))
        self.stripped: bool = spec.get("stripped", False)
        self.special_tokens: bool = spec.get("special_tokens", True)
        try:
            tokenizer = Tokenizer.from_str(
                check_tokenizer(Path(path).read_bytes() if data is None else data)
            )
        except BaseException as error:  # the library raises Exception; a Rust panic is not even one
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(
                f"{path} is no tokenizer that this version of tokenizers reads"
                f" ({' '.join(printable(str(error)).split())[:120]}); export the bundle again."
            ) from None
        # The file may have been saved with other settings: these are FluxPipeline's.
        pad_token = tokenizer.id_to_token(spec["pad_id"])
        if pad_token is None:
            raise ValueError(f"{path} has no token {spec['pad_id']} to pad with; export again.")
        tokenizer.enable_truncation(self.max_length, strategy="longest_first", direction="right")
        tokenizer.enable_padding(
            direction=spec.get("padding_side", "right"),
            pad_id=spec["pad_id"],
            pad_token=pad_token,
            length=self.max_length,
        )
        # The library keeps every word that it has met, up to 10,000 of them, 170 bytes for a short
        # one: a server's memory grows for hours. Without them a prompt of 3,400 characters takes
        # 13.7 ms in place of 12.1. (A release without this call goes on keeping them.)
        if hasattr(tokenizer.model, "_resize_cache"):
            tokenizer.model._resize_cache(0)
        self.tokenizer = tokenizer

    def text(self, prompt: str) -> str:
        """A prompt with its template, as it is tokenized."""
        for each in self.removed:
            prompt = prompt.replace(each, "")
        before, after = self.around
        return f"{before}{prompt.strip() if self.stripped else prompt}{after}"

    def truncation(self, prompt: str, encoding: Any = None) -> str | None:
        """What is cut of a prompt that is too long, as a clause; None where it fits."""
        if encoding is None:
            text = self.text(prompt)
            encoding = self.tokenizer.encode(text, add_special_tokens=self.special_tokens)
        lost = sum(1 - mask for part in encoding.overflowing for mask in part.special_tokens_mask)
        limit = f"{self.name} reads {self.max_length} tokens"
        cut = f"the last {lost} of a prompt of {len(prompt)} characters were left out"
        return f"{limit}; {cut}" if lost else None

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of three letters and more that it spells letter by letter, each once.

        ours: a word that a tokenizer's training met often has a token, or tokens of some letters.
        """
        encoding = self.tokenizer.encode(prompt)
        letters: dict[tuple[int, int], int] = {}
        # From U+2E80 on a character is a word or a syllable (Chinese, Japanese, Korean).
        words = [match.span() for match in re.finditer(r"[^\W\d_\u2e80-\U0010ffff]{3,}", prompt)]
        for start, end in encoding.offsets:
            for word in words:
                if end - start == 1 and word[0] <= start and end <= word[1]:
                    letters[word] = letters.get(word, 0) + 1
        spelled = [word for word in words if letters.get(word, 0) >= word[1] - word[0]]
        return list(dict.fromkeys(prompt[start:end] for start, end in spelled))

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Ids [len(prompts), max_length], int64. A prompt that does not fit is cut, and logged."""
        return self.tokens(prompts)[0]

    def tokens(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids, and their mask of that shape: 1 for a prompt's tokens, 0 for padding."""
        encodings = self._encodings(prompts)
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if clause := self.truncation(prompt, encoding):
                log.warning("%s", clause)
        return _arrays(encodings)

    def quiet(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `tokens`, without a word on what is cut."""
        return _arrays(self._encodings(prompts))

    def _encodings(self, prompts: Sequence[str]) -> list[Any]:
        try:
            found: list[Any] = self.tokenizer.encode_batch(
                list(map(self.text, prompts)), add_special_tokens=self.special_tokens
            )
            return found
        except BaseException as error:  # as above
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            what = " ".join(printable(str(error)).split())[:120]
            raise ValueError(
                f"{self.name} cannot read the prompt ({what}); export again."
            ) from None


def _arrays(encodings: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    ids, masks = zip(*((encoding.ids, encoding.attention_mask) for encoding in encodings))
    return np.array(ids, np.int64), np.array(masks, np.int64)
