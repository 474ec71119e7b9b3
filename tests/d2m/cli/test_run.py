"""d2m run: prompts from a file, names of images, kinds of image files."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2m.cli import main
from d2m.cli.prompts import image_files, read_prompts, slug
from runtime.image import settings_of

QUICK = ["--backend", "ort", "--steps", "1"]


def run(*arguments: object) -> int:
    return main(["run", *map(str, arguments), *QUICK])


class Bytes:
    """A standard stream of bytes, no terminal."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        return self.buffer.write(text.encode())

    def flush(self) -> None:
        self.buffer.flush()


def test_prompts_of_a_file(tmp_path: Path, tiny_bundle: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(
        b'\xef\xbb\xbfa red circle\n\n{"prompt": "a blue square", "seed": 9}\r\n a cross \n'
    )
    out = tmp_path / "made" / "{index} {seed} {prompt}.png"
    assert run(tiny_bundle, "--prompts", prompts, "-o", out, "--seed", 4) == 0
    names = ["0 4 a-red-circle.png", "1 9 a-blue-square.png", "2 4 a-cross.png"]
    assert sorted(path.name for path in out.parent.iterdir()) == names
    assert run(tiny_bundle, "a blue square", "-o", tmp_path / "one.png", "--seed", 9) == 0
    one, many = (Image.open(path) for path in (tmp_path / "one.png", out.parent / names[1]))
    assert settings_of(one)["prompt"] == settings_of(many)["prompt"] == "a blue square"
    # Of another batch, whose sums may round otherwise.
    assert np.abs(np.asarray(one, int) - np.asarray(many, int)).max() <= 1


def test_prompts_of_standard_input(
    tmp_path: Path,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", Bytes(b"a red circle\na cross\n"))
    assert run(tiny_bundle, "--prompts", "-", "-n", 2, "-o", tmp_path / "a.webp", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [Path(file).name for file in answer["files"]] == [f"a-{i}.webp" for i in range(4)]
    assert answer["seeds"] == [0, 1, 0, 1]
    said = [settings_of(file)["prompt"] for file in answer["files"]]
    assert said == ["a red circle"] * 2 + ["a cross"] * 2


def test_negative_prompts_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "negative": "blue"}\n')
    assert read_prompts(path, 1, None) == {
        "prompt": ["a", "b"],
        "seed": [1, 1],
        "negative": ["", "blue"],
    }
    assert read_prompts(path, 1, "red")["negative"] == ["red", "blue"]


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"\n \n", "holds no prompts"),
        (b"\xff\xfea", "is not UTF-8 text"),
        (b"a\n{'prompt': 1}", "line 2 of .* is not valid JSON"),
        (b'{"prompt": "a", "sed": 3}', "line 1 of .* has the key 'sed', expected keys of prompt"),
        (b'{"seed": 3}', "line 1 of .* has no prompt"),
    ],
)
def test_files_that_hold_no_prompts(data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(tmp_path / "p", 0, None)


def test_names_of_images(tmp_path: Path) -> None:
    def named(out: str, many: bool = True) -> list[str]:
        return [str(file) for file in image_files(Path(out), ["a/b ..", "ü"], [3, 4], many)]

    assert named("x/y.png") == ["x/y-0.png", "x/y-1.png"]
    assert named("x/{seed}.jpg") == ["x/3.jpg", "x/4.jpg"]
    assert named("{prompt}_{other}.png") == ["a-b_{other}.png", "ü_{other}.png"]
    assert image_files(Path("y.png"), ["a"], [0], False) == [Path("y.png")]
    assert slug("../.. {index}") == "index" and slug("?!") == "prompt"
    assert image_files(Path("{prompt}.png"), ["{seed}"], [7], False) == [Path("seed.png")]
    with pytest.raises(ValueError, match="two images would be named a.png; put {index}"):
        image_files(Path("{prompt}.png"), ["a", "a"], [3, 4], True)


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp", "PNG"])
def test_kinds_of_files_keep_the_settings(ending: str, tmp_path: Path, tiny_bundle: Path) -> None:
    out = tmp_path / f"a.{ending}"
    assert run(tiny_bundle, "a red circle", "-o", out, "--seed", 5) == 0
    assert settings_of(out)["seed"] == 5
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}.get(ending, "PNG")
    assert Image.open(out).format == kind


def test_an_image_on_standard_output(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert run(tiny_bundle, "a", "-o", "-") == 0
    assert run(tiny_bundle, "a", "-o", tmp_path / "a.png") == 0
    assert out.buffer.getvalue() == (tmp_path / "a.png").read_bytes()


def test_enlarged_and_generated_again(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large, again = (tmp_path / f"{name}.png" for name in ("small", "large", "again"))
    assert run(tiny_bundle, "a", "-o", small) == 0
    assert run(tiny_bundle, "a", "-o", large, "--scale", 3) == 0
    pixels = np.asarray(Image.open(small)).repeat(3, 0).repeat(3, 1)
    assert np.array_equal(pixels, np.asarray(Image.open(large)))
    capsys.readouterr()
    assert (
        main(["run", str(tiny_bundle), "--regenerate", str(large), "-o", str(again), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["same"]
    assert large.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["a", "-o", "a.gif"], "expected a name ending in .png, .jpg, .jpeg, .webp"),
        (["a", "-o", "-", "-n", "2"], "-o - writes one image; name a file for many"),
        (["prompts.txt"], "'prompts.txt' is a file; read its prompts with --prompts prompts.txt"),
        (["a", "b", "--prompts", "prompts.txt"], "--prompts takes the prompts from a file"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["a", "-o", "prompts.txt/a.png"], "prompts.txt"),
    ],
)
def test_refused_before_the_bundle_opens(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a\n")

    def opened(*_: Any, **__: Any) -> Any:
        raise AssertionError("the bundle was opened")

    monkeypatch.setattr("runtime.load", opened)
    assert run(*arguments) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_what_the_model_may_not_know(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    assert run(tiny_bundle, "a red circle", "-o", out) == 0
    assert "warning" not in capsys.readouterr().err
    assert run(tiny_bundle, "a zebra, a red Qwop", "-o", out, "--height", 32, "--width", 32) == 0
    said = capsys.readouterr().err
    assert "warning: tokenizer has no tokens for 'zebra', 'Qwop'" in said
    assert "warning: 32 x 32 is far from 16 x 16" in said


def test_an_image_is_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the embedded bundle; bad files are refused before it opens, one sentence each."""
    first, mask = tmp_path / "first.png", tmp_path / "mask.png"
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(values).save(first)
    Image.fromarray(np.where(np.arange(32) < 16, 255, 0).astype(np.uint8)[None].repeat(32, 0)).save(
        mask
    )
    out = tmp_path / "out.png"
    assert run("a red circle", "--image", first, "--mask", mask, "-o", out) == 0
    kept = np.asarray(Image.open(out), int)[:, 20:] - values[:, 20:]
    painted = np.asarray(Image.open(out), int)[:, :12] - values[:, :12]
    assert np.abs(kept).mean() < np.abs(painted).mean()
    assert {"image", "mask", "strength"} <= settings_of(out).keys()
    (tmp_path / "bad.png").write_text("no image")
    refused = {
        ("--image", tmp_path / "absent.png"): "is no file, expected an image",
        ("--image", tmp_path / "bad.png"): "is no image that can be read",
        ("--mask", mask): "a mask is given but no image",
        ("--image", first, "--strength", "1.5"): "strength is 1.5, expected",
        ("--control", first): "this bundle's model reads no such image",
        ("--controlnet", tmp_path): "--controlnet is given without --control",
        ("--reference", tmp_path / "absent.png"): "--reference",
        ("--reference", first): "references are given, expected none",
    }
    for arguments, sentence in refused.items():
        capsys.readouterr()
        assert run("a red circle", *arguments, "-o", out) != 0
        said = capsys.readouterr().err.strip().splitlines()
        assert sentence in said[-1], said
