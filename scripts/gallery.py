"""The dense teacher and the embedded sparse model side by side: same prompts, same noise.

    python -m scripts.gallery

Writes results/shapes/gallery.png and gallery.json. Prompt i starts from seed i. The prompts are
simple ones (how often harder ones fail: docs/results.md); no seed was replaced for its image.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import runtime
from runtime.files.atomic import write_bytes, write_json
from runtime.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent
DENSE = "models/shapes-dense"
SCENES = (
    "a red circle",
    "a green square and a white cross",
    "two triangles",
    "a cross above a square",
    "a blue triangle",
    "three circles",
    "a triangle left of a cross",
    "a yellow square",
)
PROMPTS = [f"a photo of {scene}" for scene in SCENES]
SIDE, GAP, LABEL, LINE = 128, 12, 116, 19  # pixels
INK, SOFT = (20, 20, 20), (110, 110, 110)


def dense_images(pipeline: Pipeline, seeds: list[int]) -> list[Image.Image]:
    """The teacher's images, by diffusers, from the noise that the bundle makes of the seeds."""
    import torch
    from diffusers import FluxPipeline

    defaults, latents = pipeline.manifest["defaults"], pipeline.manifest["latents"]
    size = {name: defaults[name] for name in ("height", "width")}
    latent_size = [side // latents["vae_scale_factor"] for side in size.values()]
    noise = pipeline.family.noise(seeds, latents["channels"], *latent_size)
    options = {**size, "guidance_scale": defaults["guidance"]}
    options |= {"num_inference_steps": defaults["steps"], "latents": torch.from_numpy(noise)}
    options["max_sequence_length"] = pipeline.manifest["tokenizers"]["tokenizer_2"]["max_length"]
    dense = FluxPipeline.from_pretrained(ROOT / DENSE, local_files_only=True)
    return dense(PROMPTS, **options).images


def sheet(rows: dict[str, list[Image.Image]], scenes: Sequence[str]) -> Image.Image:
    """A row per model, its name on the left, the scenes' words below, on white."""
    captions = [textwrap.wrap(scene, 16) for scene in scenes]
    step, head = SIDE + GAP, len(rows) * (SIDE + GAP) + GAP
    size = LABEL + len(scenes) * step, head + LINE * max(map(len, captions)) + GAP
    paper = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(15)
    for row, (name, images) in enumerate(rows.items()):
        top = GAP + row * step
        for line, words in enumerate(name.split("\n")):
            place = GAP, top + SIDE // 2 + (line - 1) * LINE
            pen.text(place, words, SOFT if line else INK, font)
        for column, image in enumerate(images):
            large = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            paper.paste(large, (LABEL + column * step, top))
    for column, lines in enumerate(captions):
        pen.text((LABEL + column * step, head), "\n".join(lines), INK, font)
    return paper


def main() -> None:
    """Generate both rows, write the image and what it was made with."""
    pipeline, seeds = runtime.load(backend="ort"), list(range(len(PROMPTS)))
    dense, sparse = dense_images(pipeline, seeds), pipeline(PROMPTS, seed=seeds)
    assert isinstance(sparse, list)
    path, png = ROOT / "results/shapes/gallery.png", io.BytesIO()
    sheet({"dense\n100 % FLOPs": dense, "sparse\n41 % FLOPs": sparse}, SCENES).save(png, "PNG")
    write_bytes(path, png.getvalue())
    made: dict[str, object] = {"command": "python -m scripts.gallery"}
    made |= {"prompts": PROMPTS, "seeds": seeds}
    made |= {"dense": DENSE, "sparse": "runtime/default", "defaults": pipeline.manifest["defaults"]}
    made["versions"] = {name: version(name) for name in ("torch", "diffusers", "onnxruntime")}
    write_json(path.with_suffix(".json"), made)


if __name__ == "__main__":
    main()
