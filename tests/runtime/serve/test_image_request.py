"""The body of a request: what is taken, what is refused, with one sentence and OpenAI's names."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.bundle.directory import open_bundle
from runtime.images.given import NOTHING
from runtime.latency_budget import NotMeasured
from runtime.opened import default_bundle
from runtime.serve.batch import usage
from runtime.serve.image_request import Limits, Refused, fields_of, read_request

MANIFEST = open_bundle(default_bundle(), check="sizes").manifest
LIMITS = Limits(images=4, steps=20, pixels=64 * 64, prompt=50, deadline=9.0)


def wanted(**fields: Any) -> Any:
    return read_request(json.dumps({"prompt": "a", **fields}).encode(), MANIFEST, LIMITS)


def test_what_is_left_out_comes_from_the_bundle() -> None:
    request = wanted().arguments
    assert (request.width, request.height, len(request.top_k)) == (32, 32, 16)
    assert request.guidance == 3.5 and request.top_k == [2] * 16 and request.prompts == ["a"]
    assert wanted().deadline == 9.0


def test_the_seed_is_random_unless_given() -> None:
    assert len({wanted().arguments.seeds[0] for _ in range(8)}) > 1
    assert wanted(seed=7, n=3).arguments.seeds == [7, 8, 9]


def test_every_knob_arrives() -> None:
    found = wanted(
        n=2,
        size="48x16",
        steps=2,
        guidance=1,
        top_k=[0, 4],
        kappa=[3, 1],
        sigmas=[1, 0.5],
        cache="taylor:interval:2",
        seed=1,
        user="someone",
        quality="auto",
        style=None,
        response_format="b64_json",
        model=MANIFEST["name"],
        deadline=2,
    )
    request = found.arguments
    assert (request.width, request.height, request.top_k) == (48, 16, [0, 4])
    assert request.kappa == [3, 1] and request.sigmas == (1.0, 0.5)
    assert request.cache.text == "taylor:interval:2:1" and found.key is None  # shares no batch
    assert request.guidance == 1.0 and found.deadline == 2.0 and len(request.prompts) == 2


def test_equal_keys_are_equal_shapes_and_knobs() -> None:
    assert wanted(prompt="b", seed=3, n=2).key == wanted(top_k=2, steps=16, size="32x32").key
    sigmas = [1 - i / 16 for i in range(16)]
    for other in ({"steps": 3}, {"guidance": 2}, {"size": "16x16"}, {"top_k": 1}, {"kappa": 2}):
        assert wanted(**other).key != wanted().key
    assert wanted(sigmas=sigmas).key != wanted().key


@pytest.mark.parametrize(
    "fields, param, sentence",
    [
        ({"prompt": None}, "prompt", "prompt is None, expected a text of 1 to 50"),
        ({"prompt": ""}, "prompt", "0 characters long, expected a text of 1 to 50"),
        ({"prompt": "x" * 51}, "prompt", "51 characters long"),
        ({"prompt": "\ud800"}, None, "the body is no JSON (unexpected end of hex escape"),
        ({"n": 5}, "n", "n is 5, expected a whole number from 1 to 4"),
        ({"n": 10**30}, "n", "whole number from 1 to 4"),
        ({"n": True}, "n", "n is True"),
        ({"steps": 21}, "steps", "from 1 to 20"),
        ({"steps": "4"}, "steps", "steps is '4'"),
        ({"size": "32"}, "size", "expected WIDTHxHEIGHT"),
        ({"size": "32x33"}, "size", "expected a multiple of 8"),
        ({"size": "128x64"}, "size", "expected at most 4096 pixels"),
        ({"size": 32}, "size", "size is 32"),
        ({"guidance": -1}, "guidance", "from 0 to 1000"),
        ({"top_k": 3}, "top_k", "expected one of 0, 1, 2, 4"),
        ({"top_k": [1, 2]}, "top_k", "for 16 steps"),
        ({"kappa": 4}, "kappa", "from 1 to 3"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"deadline": 10}, "deadline", "at most 9"),
        ({"deadline": 1e-9}, "deadline", "deadline is 1e-09, expected seconds from 0.001"),
        ({"guidance": "1"}, "guidance", "guidance is '1', expected a number from 0 to 1000"),
        ({"guidance": True}, "guidance", "guidance is True"),
        ({"guidance": 10**400}, "guidance", "expected a number from 0 to 1000"),
        ({"top_k": ["x"]}, "top_k", "top_k is ['x'], expected a whole number, or a list"),
        ({"seed": 1.0}, "seed", "seed is 1.0, expected a whole number"),
        ({"size": "32x32\n"}, "size", "expected WIDTHxHEIGHT"),
        ({"size": "2000x2000"}, "size", "expected at most 4096 pixels"),
        ({"output_format": "gif"}, "output_format", "is 'gif', expected 'png', 'jpeg' or 'webp'"),
        ({"output_compression": 101}, "output_compression", "whole number from 0 to 100"),
        ({"quality": "best"}, "quality", "quality is 'best', expected 'auto', 'standard', 'hd'"),
        ({"background": "transparent"}, "background", "expected 'auto' or 'opaque'"),
        ({"response_format": "url"}, "response_format", "keeps no images"),
        ({"stream": "yes"}, "stream", "stream is 'yes', expected"),
        ({"negative": "x"}, "negative", "the field 'negative' is not known"),
        ({"negative_prompt": "x"}, "negative_prompt", "negative is 'x', expected none: this bun"),
        (
            {"negative_prompt": ""},
            "negative_prompt",
            "does not generate with classifier-free guidance",
        ),
        ({"negative_prompt": "x" * 51}, "negative_prompt", "51 characters long, expected a text"),
        (
            {"negative_prompt": ["x"]},
            "negative_prompt",
            "negative_prompt is ['x'], expected a text",
        ),
        ({"sigmas": [1, 1]}, "sigmas", "sigmas holds 1.0 after 1.0"),
        ({"sigmas": [0.5], "steps": 2}, "sigmas", "lists 1 noise levels but steps is 2"),
        ({"sigmas": [1 / (i + 1) for i in range(21)]}, "steps", "steps is 21, expected a whole"),
        ({"budget": 1}, "budget", "budget is not known here"),
        ({"cache": "often"}, "cache", "cache is 'often', expected none, auto, first-block:"),
        ({"cache": 2}, "cache", "cache is 2, expected a text"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str | None, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        wanted(**fields)
    error = json.loads(caught.value.response().body)["error"]
    assert caught.value.status == 400 and error["type"] == "invalid_request_error"
    assert sentence in error["message"], error
    if param != "negative":
        assert error["param"] == param


def test_a_budget_picks_what_is_left_out_and_is_drawn_alone() -> None:
    body = json.dumps({"prompt": "a", "top_k": 1, "budget": 2.5}).encode()

    def within(request: Any, budget: float, knobs: Any) -> dict[str, Any]:
        assert (budget, knobs) == (2.5, {"steps": None, "top_k": 1, "kappa": None})
        return {"steps": 3, "top_k": 1, "kappa": 2}

    found = read_request(body, MANIFEST, LIMITS, within)
    assert (found.arguments.top_k, found.arguments.kappa) == ([1] * 3, [2] * 3)
    assert found.key is None

    def unmeasured(request: Any, budget: float, knobs: Any) -> dict[str, Any]:
        raise NotMeasured("no budget was measured; measure it with: d2m measure /srv/secret")

    with pytest.raises(Refused, match=r"no budget was measured .* on this machine") as caught:
        read_request(body, MANIFEST, LIMITS, unmeasured)
    assert caught.value.param == "budget" and "/srv" not in caught.value.message


def test_another_model_is_not_found() -> None:
    with pytest.raises(Refused) as caught:
        wanted(model="dall-e-3")
    assert caught.value.status == 404 and caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "guidance": -Infinity}',
        b"[" * 60_000,
        b"1",
    ],
)
def test_bodies_that_are_no_object(body: bytes) -> None:
    with pytest.raises(Refused, match="the body is"):
        read_request(body, MANIFEST, LIMITS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)
NAMES = st.sampled_from(
    [
        *("prompt", "n", "size", "steps", "guidance", "top_k", "seed", "deadline", "stream"),
        *("style", "sigmas", "negative_prompt", "budget", "kappa", "quality", "output_format"),
        *("output_compression", "background", "partial_images"),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, VALUES))
def test_anything_is_drawable_or_refused(fields: dict[str, Any]) -> None:
    try:
        found = read_request(json.dumps(fields).encode(), MANIFEST, LIMITS)
    except Refused as refused:
        assert refused.status in (400, 404) and len(refused.message) < 400
    else:
        hash(found.key)
        assert len(found.arguments.prompts) <= 4 and len(found.arguments.top_k) <= 20


def test_usage_counts_blocks_of_all_steps() -> None:
    """Three groups of three: two, one and three blocks of each run in the three steps."""
    request = wanted(steps=3, top_k=[0, 1, 1], kappa=[2, 1, 3]).arguments
    cached = wanted(steps=6, kappa=2, cache="first-block:0.1").arguments
    # 18 blocks, three of them left out by groups; of two skipped steps the first block runs.
    assert usage(MANIFEST, cached, 2.0)["blocks"] == 6 * 15 - 2 * 14
    assert usage(MANIFEST, request) == {
        "blocks": 54 - 3 - 6,
        "blocks_of": 54,
        "experts_per_token": [0, 1, 1],
        "experts_of": 12,
    }


def test_usage_leaves_out_what_groups_leave_out() -> None:
    component = dict(MANIFEST["components"]["transformer"])
    component["groups"] = {"a": {"calls": [1, 2, 3]}, "b": {"calls": [7, 8]}}
    manifest = {**MANIFEST, "components": {"transformer": component}}

    class Kept:
        top_k = (2, 2)
        kappa = (1, 2)
        images = NOTHING

    found = usage(manifest, Kept())  # type: ignore[arg-type]
    assert found["blocks_of"] == 36 and found["blocks"] == 36 - (2 + 1) - (1 + 0)


def test_an_infinite_number_is_refused() -> None:
    for number in ("1e400", "-1e400"):
        body = f'{{"prompt": "a", "guidance": {number}}}'.encode()
        with pytest.raises(Refused, match="guidance is -?inf, expected a number from 0 to 1000"):
            read_request(body, MANIFEST, LIMITS)


def test_what_openais_clients_send_by_default_is_taken_and_said_to_have_no_effect() -> None:
    """DALL-E's client sends a size and a quality whatever the model makes."""
    found = wanted(size="1024x1024", quality="standard", style="vivid", moderation="auto")
    assert (found.arguments.width, found.arguments.height) == (32, 32)
    assert found.notes == (
        "size 1024x1024 became 32x32",
        "quality standard has no effect",
        "style vivid has no effect",
    )
    wide = wanted(size="1792x1024").arguments
    assert (wide.width, wide.height) == (40, 24)  # 1.75 : 1 of about 1,024 pixels, in eighths
    assert wanted(size="auto", quality="auto", background="opaque", user="me").notes == ()
    larger = Limits(pixels=1 << 20)
    body = json.dumps({"prompt": "a", "size": "256x256"}).encode()
    exact = read_request(body, MANIFEST, larger)
    assert exact.arguments.width == 256 and exact.notes == ()


def test_an_alias_is_the_model() -> None:
    body = json.dumps({"prompt": "a", "model": "dall-e-3"}).encode()
    assert read_request(body, MANIFEST, LIMITS, aliases=["dall-e-3"]).arguments.prompts == ["a"]
    body = json.dumps({"prompt": "a", "model": "dall-e-2"}).encode()
    with pytest.raises(Refused, match="expected 'shapes-s', 'dall-e-3' or none") as caught:
        read_request(body, MANIFEST, LIMITS, aliases=["dall-e-3"])
    assert caught.value.status == 404


def test_every_field_says_what_it_expects() -> None:
    schema = fields_of(LIMITS).model_json_schema()
    assert schema["additionalProperties"] is False and schema["required"] == ["prompt"]
    assert schema["properties"]["n"]["description"] == "a whole number from 1 to 4"
