"""Token ids against transformers' tokenizers, called as FluxPipeline calls them."""

import ctypes
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.tokenizer import TextTokenizer

pytest.importorskip("transformers")

PROMPTS = [
    "",
    " ",
    "a red circle",
    "A RED Circle, above  two blue squares.",
    "three green triangles\tand\na cross",
    "it's 42, the 'ring' - photo",
    "na\u00efve \u5186\u5f62 \U0001f534 \u00e9 e\u0301 \ufb01 \u00a0 \u200b \x00 \u2581",
    "<|startoftext|> red <|endoftext|> blue </s> green <pad> <unk>",
    "<|endoftext|></s>",
    "one two three four red green blue yellow purple white orange cyan black circle star ring",
    "zzz qqq xxyyzz " * 20,
]


@pytest.fixture(scope="module", params=["tokenizer", "tokenizer_2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' tokenizer, a factory of ours for a length)."""
    from tests.tiny.pipeline import clip_tokenizer, t5_tokenizer

    theirs = clip_tokenizer() if request.param == "tokenizer" else t5_tokenizer()
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)

    def make(length: int) -> TextTokenizer:
        spec = {"max_length": length, "pad_id": theirs.pad_token_id}
        return TextTokenizer(request.param, folder / "tokenizer.json", spec)

    return theirs, make


def expected(tokenizer: Any, prompts: list[str], length: int) -> np.ndarray:
    """As in FluxPipeline._get_clip_prompt_embeds and _get_t5_prompt_embeds."""
    return tokenizer(
        prompts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_length=False,
        return_overflowing_tokens=False,
        return_tensors="np",
    ).input_ids


@pytest.mark.parametrize("length", [2, 3, 16, 77])
def test_ids_are_those_of_transformers(pair: Any, length: int) -> None:
    theirs, make = pair
    found = make(length)(PROMPTS)
    assert found.dtype == np.int64 and found.shape == (len(PROMPTS), length)
    np.testing.assert_array_equal(found, expected(theirs, PROMPTS, length))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(prompts=st.lists(st.text(max_size=40), min_size=1, max_size=3))
def test_ids_of_any_text(pair: Any, prompts: list[str]) -> None:
    theirs, make = pair
    np.testing.assert_array_equal(make(16)(prompts), expected(theirs, prompts, 16))


def test_a_cut_prompt_is_logged(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, make = pair
    tokenizer = make(8)
    with caplog.at_level(logging.WARNING, "runtime"):
        tokenizer(["a red circle", "red " * 5])
        assert not caplog.records
        tokenizer(["red " * 10])
    (record,) = caplog.records
    special = 2 if tokenizer.name == "tokenizer" else 1
    assert f"reads 8 tokens; the last {10 - (8 - special)} of a prompt" in record.getMessage()


def test_settings_saved_in_the_file_do_not_count(pair: Any, tmp_path: Path) -> None:
    theirs, make = pair
    make(16)
    other = make(5).tokenizer
    other.save(str(tmp_path / "tokenizer.json"))
    spec = {"max_length": 16, "pad_id": theirs.pad_token_id}
    ours = TextTokenizer("tokenizer", tmp_path / "tokenizer.json", spec)
    np.testing.assert_array_equal(ours(PROMPTS), expected(theirs, PROMPTS, 16))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:100],
        lambda text: "{}",
        lambda text: json.dumps({**json.loads(text), "model": {"type": "Pickle"}}),
    ],
)
def test_a_file_that_is_no_tokenizer(
    pair: Any, tmp_path: Path, change: Callable[[str], str]
) -> None:
    _, make = pair
    path = tmp_path / "tokenizer.json"
    path.write_text(change(make(16).tokenizer.to_str()))
    with pytest.raises(ValueError, match="is no tokenizer that this version.*export"):
        TextTokenizer("tokenizer", path, {"max_length": 16, "pad_id": 0})


def test_a_pad_id_that_does_not_exist(pair: Any, tmp_path: Path) -> None:
    _, make = pair
    path = tmp_path / "tokenizer.json"
    path.write_text(make(16).tokenizer.to_str())
    with pytest.raises(ValueError, match="no token 99999 to pad with"):
        TextTokenizer("tokenizer", path, {"max_length": 16, "pad_id": 99999})


class Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
        )
    ]


def test_words_are_not_kept(pair: Any) -> None:
    """The library's own cache would take 170 bytes for each new word, up to 10,000 of them."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("not glibc, or one before 2.33")
    library.mallinfo2.restype = Heap
    ours = pair[1](16)
    ours([f"a photo of {word}" for word in range(1000)])
    before = library.mallinfo2().uordblks
    for word in range(1000, 4000):
        ours([f"a photo of {word}"])
    assert library.mallinfo2().uordblks - before < 100_000
