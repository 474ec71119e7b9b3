"""Emoji as the captions want them, through the VAE, and from one model or several: same noise.

    python -m scripts.emoji_gallery models/emoji-dense [more pipeline directories] --out FILE.png

Image i starts from seed i; no seed was replaced for its image. Beside the image goes FILE.json with
what it was made with.
"""

from __future__ import annotations

import argparse
import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calib.emoji.render import render_batch
from calib.emoji.verify import verify
from calib.emoji.world import COLOURS, RELATIONS, Scene, World, split_of, words_of
from d2m.cli.terminal import say
from d2m.generate import generate_with, load_pipeline, settings
from runtime.files.atomic import write_bytes, write_json
from scripts.gallery import sheet

# Prefix, category, first emoji, and the rest of the content: another emoji and how they stand, a
# background, a number. None was seen in training: the single ones' captions, the others' contents.
CONTENTS: tuple[tuple[str, str, str, Any], ...] = (
    ("draw me", "single", "owl", None),
    ("draw", "single", "tea", None),
    ("", "background", "octopus", "blue"),
    ("", "background", "ghost", "black"),
    ("", "pair", "crown", ("above", "lion face")),
    ("", "pair", "umbrella", ("above", "penguin")),
    ("", "pair", "bee", ("left of", "sunflower")),
    ("", "pair", "balloon", ("right of", "house")),
    ("", "count", "strawberry", 2),
    ("", "count", "doughnut", 3),
)


def scenes_of(world: World) -> list[Scene]:
    """The scenes of CONTENTS; ValueError names an emoji that the world does not have."""
    found = []
    for prefix, category, name, more in CONTENTS:
        things: tuple[str, ...] = (name,)
        relation, background = None, "white"
        if category == "background":
            background = more
        elif category == "pair":
            relation, other = more
            things = (name, other)
        elif category == "count":
            things = (name,) * more
        assert relation in (None, *RELATIONS) and background in ("white", *COLOURS)
        if missing := sorted(set(things) - set(world.names)):
            raise ValueError(f"the world has no emoji called {', '.join(missing)}")
        caption = f"{prefix} {words_of(things, relation, background)}".strip()
        found.append(Scene(category, things, relation, background, caption))
    return found


def through_vae(pipe: Any, images: np.ndarray) -> list[Image.Image]:
    """Images, uint8 [B, 64, 64, 3], encoded and decoded."""
    import torch

    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).to(pipe.vae.dtype) / 127.5 - 1
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample.float()
    pixels = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in pixels]


def main() -> None:
    """Generate every row, write the image and what it was made with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--names", help="of the rows, with commas; the directories' by default")
    parser.add_argument("--out", type=Path, default=Path("results/emoji/gallery.png"))
    args = parser.parse_args()
    names = args.names.split(",") if args.names else [path.name for path in args.models]
    world = World()
    scenes = scenes_of(world)
    truth = render_batch(scenes, world, np.random.default_rng(0))
    rows = {"asked for": [Image.fromarray(each) for each in truth]}
    judged = {}
    for name, model in zip(names, args.models, strict=True):
        pipe, values = load_pipeline(model), settings(model)
        if len(rows) == 1:
            rows["through\nthe VAE"] = through_vae(pipe, truth)
        draw = generate_with(pipe, batch_size=len(scenes), **values)
        rows[name] = list(draw([s.caption for s in scenes], list(range(len(scenes)))))
        verdicts = [verify(np.asarray(i), s, world) for i, s in zip(rows[name], scenes)]
        judged[name] = [verdict.ok for verdict in verdicts]
        say(f"{name}: {sum(judged[name])} of {len(scenes)} are exactly as asked for")
    png = io.BytesIO()
    sheet(rows, [scene.caption for scene in scenes]).save(png, "PNG")
    write_bytes(args.out, png.getvalue())
    made: dict[str, Any] = {"models": list(map(str, args.models)), "names": names}
    made |= {"prompts": [scene.caption for scene in scenes], "seeds": list(range(len(scenes)))}
    made |= {"exact": judged, "splits": [split_of(world, scene) for scene in scenes]}
    made["versions"] = {name: version(name) for name in ("torch", "diffusers")}
    write_json(args.out.with_suffix(".json"), made)


if __name__ == "__main__":
    main()
