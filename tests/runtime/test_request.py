"""Every argument of a call: what is filled in, and what is refused in one sentence."""

from typing import Any

import numpy as np
import pytest

from runtime.families.latents import pack
from runtime.request import check_request, read_latents

MANIFEST: dict[str, Any] = {
    "family": "flux",
    "top_k": 2,
    "top_k_choices": [0, 1, 2, 4],
    "defaults": {"steps": 16, "guidance": 3.5, "height": 32, "width": 48},
    "latents": {"channels": 4, "vae_scale_factor": 4, "patch": 2},
}
DENSE = {**MANIFEST, "top_k": None, "top_k_choices": []}


def test_defaults_come_from_the_bundle() -> None:
    request = check_request(MANIFEST, "a")
    assert (request.prompts, request.seeds, request.many) == (["a"], [0], False)
    assert (request.height, request.width, request.latent_size) == (32, 48, (8, 12))
    assert request.top_k == [2] * 16 and request.guidance == 3.5
    assert check_request(DENSE, "a").top_k == [None] * 16


def test_sigmas_set_the_steps() -> None:
    manifest = {**MANIFEST, "scheduler": {}}
    request = check_request(manifest, "a", sigmas=np.array([1, 0.5, 0.25]))
    assert request.sigmas == (1.0, 0.5, 0.25) and request.top_k == [2] * 3
    assert request.settings(0)["sigmas"] == [1.0, 0.5, 0.25] and request.settings(0)["steps"] == 3
    assert check_request(manifest, "a", sigmas=[1], steps=1).sigmas == (1.0,)
    assert "sigmas" not in check_request(manifest, "a").settings(0)
    for sigmas, words in (
        ([], "expected a list of 1 to 1000 decreasing numbers"),
        (3, "sigmas is 3, expected a list"),
        ([1, 0.5, 0.5], "sigmas holds 0.5 after 0.5, expected decreasing numbers"),
        ([0.5, 0.7], "sigmas holds 0.7 after 0.5"),
        ([1.5, 1], "sigmas holds 1.5, expected"),
        ([1, 0], "sigmas holds 0, expected"),
        ([1, float("nan")], "sigmas holds nan"),
        ([True], "sigmas holds True"),
        (["1"], "sigmas holds '1'"),
    ):
        with pytest.raises(ValueError, match=words):
            check_request(manifest, "a", sigmas=sigmas)
    with pytest.raises(ValueError, match="lists 2 noise levels but steps is 3"):
        check_request(manifest, "a", sigmas=[1, 0.5], steps=3)
    with pytest.raises(ValueError, match="scheduler has use_flow_sigmas set"):
        check_request({**MANIFEST, "scheduler": {"use_flow_sigmas": True}}, "a", sigmas=[1])


def test_prompts_and_seeds() -> None:
    request = check_request(MANIFEST, ["a", "b"], seed=[5, 90], n=2)
    assert request.prompts == ["a", "a", "b", "b"] and request.seeds == [5, 6, 90, 91]
    assert check_request(MANIFEST, ("a", "b"), seed=3).seeds == [3, 3]
    assert check_request(MANIFEST, ["a"]).many and check_request(MANIFEST, "a", n=2).many


def test_numpy_numbers_are_numbers() -> None:
    request = check_request(
        MANIFEST,
        "a",
        seed=np.int64(7),
        steps=np.int32(3),
        guidance=np.float32(1.5),
        top_k=np.array([0, 1, 4]),
    )
    assert request.seeds == [7] and request.top_k == [0, 1, 4]
    assert all(type(k) is int for k in request.top_k) and type(request.guidance) is float


def test_settings() -> None:
    request = check_request(MANIFEST, "a", seed=4, n=2, steps=2, top_k=[1, 2])
    assert request.settings(1) == {
        "prompt": "a",
        "seed": 5,
        "steps": 2,
        "guidance": 3.5,
        "height": 32,
        "width": 48,
        "top_k": [1, 2],
    }
    assert check_request(MANIFEST, "a").settings(0)["top_k"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": 3}, "the prompt is int 3, expected a text"),
        ({"prompt": []}, r"the prompt is list \[\], expected"),
        ({"prompt": None}, "the prompt is NoneType None, expected"),
        ({"prompt": ["a", b"b"]}, "a prompt is bytes b'b', expected a text"),
        ({"prompt": "x" * 100_001}, "has 100001 characters, expected at most 100000"),
        ({"prompt": "\ud83d"}, "half a surrogate pair"),
        ({"prompt": ["a"] * 10_001}, "10001 prompts, expected at most"),
        ({"n": 0}, "n is 0, expected a whole number from 1 to 10000"),
        ({"n": True}, "n is True"),
        ({"n": 10**9}, "n is 1000000000, expected"),
        ({"seed": -1}, "seed is -1, expected"),
        ({"seed": 2**63}, "seed is 9223372036854775808, expected"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"seed": "1"}, "seed is '1', expected"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seed": [None]}, "seed is None"),
        ({"steps": 0}, "steps is 0, expected a whole number from 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"steps": 2.0}, r"steps is 2\.0"),
        ({"height": 36}, "height is 36, expected a multiple of 8 .*; 32 is the nearest below"),
        ({"height": 0}, "height is 0, expected a multiple of 8 from 8 to 16384"),
        ({"width": 1 << 20}, "width is 1048576, expected a multiple"),
        ({"width": "big"}, "width is 'big'"),
        ({"guidance": "high"}, "guidance is 'high', expected a number from 0 to 1000"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1}, "guidance is -1"),
        ({"guidance": True}, "guidance is True"),
        ({"top_k": 3}, "top_k is 3, expected one of 0, 1, 2, 4.*--top-k"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": [2]}, "top_k lists 1 numbers for 16 steps"),
        ({"top_k": [2] * 15 + [9]}, "top_k is 9"),
    ],
)
def test_refusals(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as info:
        check_request(MANIFEST, **{"prompt": "a", **arguments})
    assert "\n" not in str(info.value) and len(str(info.value)) < 300


def test_a_dense_bundle_has_no_top_k() -> None:
    with pytest.raises(ValueError, match="top_k is 2, expected none: .* dense"):
        check_request(DENSE, "a", top_k=2)


def test_latents_packed_or_not() -> None:
    request = check_request(MANIFEST, "a", n=3)
    unpacked = np.random.default_rng(0).standard_normal((3, 4, 8, 12))
    packed = pack(unpacked).astype(np.float32)
    for given in (unpacked, packed, packed.astype(np.float16)):
        found = read_latents(given, request, MANIFEST)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, packed, atol=1e-2)


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        ([[1.0]], "latents is list, expected a numpy array"),
        (np.zeros((1, 24, 16), np.int64), "latents is int64, expected"),
        (np.zeros((2, 24, 16)), r"shape \[2, 24, 16\], expected \[1, 24, 16\] .*\[1, 4, 8, 12\]"),
        (np.full((1, 24, 16), np.nan), "latents holds NaN"),
    ],
)
def test_latents_refused(latents: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_latents(latents, check_request(MANIFEST, "a"), MANIFEST)
