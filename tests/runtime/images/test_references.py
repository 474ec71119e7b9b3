"""References: sizes as diffusers has them, what a call and its images say, the same again."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.bundle.directory import open_bundle
from runtime.families import FAMILIES
from runtime.families.flux import REFERENCE
from runtime.image import save, settings_of
from runtime.images.references import check_references
from runtime.opened import default_bundle
from runtime.pipeline import Pipeline
from runtime.regenerate import regenerate
from runtime.request import check_request

LATENTS = {"vae_scale_factor": 8, "patch": 2}
FLUX2 = {"family": "flux2", "latents": LATENTS}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), np.uint8)
    return Image.fromarray(small).resize((width, height))


@pytest.mark.parametrize("size", [(1024, 1024), (300, 700), (500, 333), (64, 1000), (768, 1024)])
def test_kontext_takes_the_size_of_the_list_that_is_nearest(size: tuple[int, int]) -> None:
    """diffusers' own list; and as much smaller for a model that generates less."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    height, width = size
    pairs = [(abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS]
    _, columns, rows = min(pairs)
    manifest: dict[str, Any] = {"latents": LATENTS, "defaults": {"height": 1024, "width": 1024}}
    assert FAMILIES["flux"].reference_size(manifest, *size) == ((rows, columns),) * 2
    manifest["defaults"] = {"height": 512, "width": 512}
    half = tuple(side // 2 // 16 * 16 for side in (rows, columns))
    assert FAMILIES["flux"].reference_size(manifest, *size) == (half, half)


@pytest.mark.parametrize("size", [(100, 83), (1100, 1300), (64, 64)])
def test_flux2_sees_what_diffusers_makes_of_an_image(size: tuple[int, int]) -> None:
    """Made smaller to an area, then cut to whole tokens; one value of 255 by rounding."""
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    image, processor = picture(*size), Flux2ImageProcessor(vae_scale_factor=16)
    (ours,) = check_references(FLUX2, [image]).pixels
    image = processor._resize_if_exceeds_area(image)
    width, height = (side // 16 * 16 for side in image.size)
    theirs = processor.preprocess(image, height=height, width=width, resize_mode="crop")[0]
    assert ours.shape == theirs.shape and np.abs(ours - theirs.numpy()).max() < 1e-6


def test_what_cannot_be_seen_is_refused() -> None:
    with pytest.raises(ValueError, match="11 references are given, expected at most 10"):
        check_references(FLUX2, [picture(64, 64)] * 11)
    with pytest.raises(ValueError, match="a reference is str 'a.png', expected a PIL image"):
        check_references(FLUX2, ["a.png"])
    with pytest.raises(ValueError, match="64 x 8 pixels, expected a side of at least 16"):
        check_references(FLUX2, picture(8, 64))
    manifest = open_bundle(default_bundle(), check="sizes").manifest
    with pytest.raises(ValueError, match="references are given, expected none: .*--image"):
        check_request(manifest, "a", references=[picture(64, 64)])
    assert check_references(manifest, []).pixels == ()


def test_an_image_says_its_references_and_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The embedded model, as though it were Kontext: the whole way with its own VAE."""
    import runtime.opened

    opened = open_bundle(default_bundle(), check="sizes")
    opened.manifest["latents"]["condition"] = REFERENCE
    monkeypatch.setattr(runtime.opened, "open_bundle", lambda *args: opened)
    model, seen = Pipeline(None, "ort", threads=1), picture(60, 90)
    asked: dict[str, Any] = {"steps": 2, "seed": 3}
    with caplog.at_level(logging.WARNING, "runtime"):
        image = model("a red circle", references=[seen], **asked)
    assert isinstance(image, Image.Image) and image.size == (32, 24)
    assert "a reference of 90 x 60 pixels was made 32 x 24" in caplog.text
    said = settings_of(image)
    assert [len(digest) for digest in said["references"]] == [64]
    assert said["reference_sizes"] == [[90, 60]]
    other = model("a red circle", references=picture(60, 90, seed=1), **asked)
    alone = model("a red circle", height=24, width=32, **asked)
    assert len({each.tobytes() for each in (image, other, alone)}) == 3
    pair = model(["a red circle"] * 2, references=[seen], cache="first-block:0.0000001", **asked)
    assert isinstance(pair, list) and settings_of(pair[1])["steps_skipped"] == 0
    save(image, tmp_path / "once.png")
    with pytest.raises(ValueError, match="from references, expected the same files: name them"):
        regenerate(tmp_path / "once.png", threads=1)
    with pytest.raises(ValueError, match="from another reference than the one that is given"):
        regenerate(
            tmp_path / "once.png", threads=1, images={"references": [picture(60, 90, seed=1)]}
        )
    _, compared = regenerate(tmp_path / "once.png", threads=1, images={"references": [seen]})
    assert compared["same"]
