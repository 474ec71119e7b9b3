"""An image made again from its PNG, to the last bit; a drawing given up half-way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.image import KEY, save, settings_of, to_image, to_png
from runtime.pipeline import Pipeline
from runtime.regenerate import regenerate
from runtime.sampling import Cancelled, decode

PROMPT = "a photo of a red circle"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(None, "ort", threads=1)


@pytest.mark.parametrize("n", [1, 3])
def test_an_image_is_drawn_again_to_the_last_bit(
    pipeline: Pipeline, tmp_path: Path, n: int
) -> None:
    answer = pipeline(PROMPT, seed=5, steps=3, guidance=2.5, n=n)
    image = answer[-1] if isinstance(answer, list) else answer
    path = save(image, tmp_path / "a.png")
    assert settings_of(path)["batch"] == n and settings_of(path)["seed"] == 4 + n
    again, told = regenerate(path, threads=1)
    assert told["same"] and told["pixels_that_differ"] == told["largest_difference"] == 0
    assert to_png(again) == path.read_bytes()


def test_sigmas_are_said_and_drawn_again(pipeline: Pipeline, tmp_path: Path) -> None:
    """Those that the scheduler would take itself change nothing; others do."""
    plain = pipeline(PROMPT, seed=5, steps=4)
    even = pipeline(PROMPT, seed=5, sigmas=[1, 0.75, 0.5, 0.25])
    assert plain.tobytes() == even.tobytes()
    other = pipeline(PROMPT, seed=5, sigmas=[1, 0.9, 0.5, 0.25])
    assert other.tobytes() != plain.tobytes()
    path = save(other, tmp_path / "a.png")
    assert settings_of(path)["sigmas"] == [1, 0.9, 0.5, 0.25]
    again, told = regenerate(path, threads=1, offload="block")
    assert told["same"] and to_png(again) == path.read_bytes()


def test_a_changed_image_is_made_again_from_the_same_files(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """Image and mask are known by their pixels' hashes; others, or none, are refused."""
    first = np.random.default_rng(0).integers(0, 256, (40, 33, 3), np.uint8)
    mask = np.eye(40, 33) > 0
    given = {"image": first, "mask": mask}
    path = save(pipeline(PROMPT, seed=5, steps=3, strength=0.7, **given), tmp_path / "a.png")
    assert settings_of(path)["image_size"] == [33, 40]
    again, told = regenerate(path, threads=1, images=given)
    assert told["same"] and to_png(again) == path.read_bytes()
    with pytest.raises(ValueError, match="generated from an image.*--image"):
        regenerate(path, threads=1)
    with pytest.raises(ValueError, match="from another mask than the one that is given"):
        regenerate(path, threads=1, images={"image": first, "mask": ~mask})
    plain = save(pipeline(PROMPT, seed=5, steps=1), tmp_path / "b.png")
    with pytest.raises(ValueError, match="was generated without image, expected none"):
        regenerate(plain, threads=1, images={"image": first})


def test_a_callback_sees_every_step(pipeline: Pipeline) -> None:
    """Latents of every batch, the filling rows left out; the last ones are what is decoded."""
    seen: list[tuple[int, int, np.ndarray]] = []
    filled = Pipeline(pipeline.bundle, "ort", threads=1, max_batch=2, min_batch=2)
    images = filled(
        [PROMPT] * 3, seed=[1, 2, 3], steps=2, callback=lambda *state: seen.append(state)
    )
    assert [(done, steps, len(latents)) for done, steps, latents in seen] == [
        (1, 2, 2), (2, 2, 2), (1, 2, 1), (2, 2, 1),
    ]  # fmt: skip
    size = (8, 8)
    tokens = filled.manifest["latents"]["channels"] * 4
    assert seen[0][2].shape == (2, 16, tokens) and not np.array_equal(seen[0][2], seen[1][2])
    decoded = decode(filled, seen[1][2], size)
    assert [to_image(p).tobytes() for p in decoded] == [i.tobytes() for i in images[:2]]


def test_rows_that_fill_a_batch_up_are_thrown_away(pipeline: Pipeline, tmp_path: Path) -> None:
    filled = Pipeline(pipeline.bundle, "ort", threads=1, min_batch=2)
    image: Any = filled(PROMPT, seed=5, steps=3)
    first, _ = pipeline([PROMPT, "b"], seed=[5, 9], steps=3)  # type: ignore[misc]
    assert np.array_equal(np.asarray(image), np.asarray(first))
    path = save(image, tmp_path / "a.png")
    assert settings_of(path)["batch"] == 2
    again, told = regenerate(path, threads=1)
    assert told["same"] and to_png(again) == path.read_bytes()


def rewritten(path: Path, **changes: Any) -> Path:
    """The same picture that says something else of itself."""
    image = Image.open(path)
    image.info[KEY] = json.dumps(settings_of(path) | changes)
    return save(image, path.with_name("changed.png"))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"bundle": "0" * 64}, "was generated from bundle 000000000000"),
        ({"seed": None}, "from given latents"),
        ({"batch": 10**9}, "expected a whole number from 1 to 1024"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"height": 64}, "is 32 x 32 pixels but says that it is 32 x 64"),
        ({"backend": "../x"}, "the backend is '../x'"),
        ({"bundle": 7}, "does not say how it was made"),
    ],
)
def test_what_cannot_be_drawn_again(
    pipeline: Pipeline, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    path = rewritten(save(pipeline(PROMPT, steps=1), tmp_path / "a.png"), **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=sentence):
        regenerate(path, threads=1)


def test_another_picture_differs(pipeline: Pipeline, tmp_path: Path) -> None:
    path = rewritten(save(pipeline(PROMPT, steps=1), tmp_path / "a.png"), seed=8)  # type: ignore[arg-type]
    _, told = regenerate(path, threads=1)
    assert not told["same"] and told["pixels_that_differ"] > 100


def test_on_the_command_line(pipeline: Pipeline, tmp_path: Path) -> None:
    path = save(pipeline(PROMPT, seed=3, steps=2), tmp_path / "a.png")  # type: ignore[arg-type]
    command = [sys.executable, "-m", "d2m", "run", "--regenerate", str(path), "--json"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "b.png")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["same"]
    assert (tmp_path / "b.png").read_bytes() == path.read_bytes()
    for arguments, sentence in (
        (["a prompt", "another"], "takes the prompt from the image"),
        ([str(tmp_path)], "has no manifest.json"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr


def test_cancel_stops_at_the_next_step(pipeline: Pipeline) -> None:
    seen: list[tuple[str, int, int]] = []

    def cancel() -> bool:
        return ("denoise", 3, 16) in seen

    with pytest.raises(Cancelled):
        pipeline(PROMPT, steps=16, progress=lambda *told: seen.append(told), cancel=cancel)
    assert seen[-1] == ("denoise", 3, 16)
    with pytest.raises(Cancelled):
        runtime.run(PROMPT, cancel=lambda: True)
    assert pipeline(PROMPT, steps=1)  # and it draws on


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("[" * 100_000, "is not valid JSON"),
        ('{"a": NaN}', "is not valid JSON"),
        ('["a"]', "expected a JSON object"),
        ('{"bundle": "x", "prompt": ["a"], "seed": 1}', "does not say how it was made"),
        (
            '{"bundle": "\\u001b[2J", "prompt": "a", "seed": 1, "backend": "ort",'
            ' "name": "\\u001b"}',
            r"from bundle \\x1b\[2J\.\.\. named '\\x1b'",
        ),
    ],
)
def test_what_an_image_says_is_not_trusted(tmp_path: Path, said: str, words: str) -> None:
    from PIL import Image

    image = Image.new("RGB", (2, 2))
    image.info["d2m"] = said
    with pytest.raises(ValueError, match=words) as caught:
        regenerate(save(image, tmp_path / "a.png"), threads=1)
    assert str(caught.value).isprintable()


def test_an_image_of_more_pixels_than_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    path = save(Image.new("RGB", (64, 64)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="is no image of d2m: Image size"):
        regenerate(path, threads=1)
