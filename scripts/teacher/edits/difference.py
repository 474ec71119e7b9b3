#!/usr/bin/env python
"""The editing teacher as it is kept: its difference from models/shapes-dense.

    python -m scripts.teacher.edits.difference out/shapes-edit          # models/shapes-edit, whole
    python -m scripts.teacher.edits.difference runs/shapes-edit --pack    # and back

Both are one architecture, so a quarter of the bytes holds what training changed: matrices in 4 bits
with a float16 scale a row, vectors in bfloat16; tables of embeddings, which have other words, are
whole. VAE and scheduler are those of shapes-dense.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.files.atomic import replace_dir

DENSE, KEPT = Path("models/shapes-dense"), Path("models/shapes-edit")
FILE = "difference.safetensors"
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
OWN = (
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    *("tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer_config.json"),
    *("text_encoder/config.json", "text_encoder_2/config.json"),
    *("model_index.json", "defaults.json"),
)
SHARED = (
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    *("scheduler/scheduler_config.json", "transformer/config.json"),
)
LEVELS = 7  # of each sign


def packed(difference: Tensor) -> dict[str, Tensor]:
    """A matrix [N, M] of even M as `levels` uint8 [N, M / 2] and `scale` [N]."""
    scale = (difference.abs().amax(1) / LEVELS).clamp_min(1e-7).half()
    levels = (difference / scale.float()[:, None]).round().clamp(-LEVELS, LEVELS).int() + 8
    return {"levels": (levels[:, ::2] | levels[:, 1::2] << 4).byte(), "scale": scale}


def unpacked(levels: Tensor, scale: Tensor) -> Tensor:
    """Undo `packed`, but for rounding: float32 [N, M]."""
    pairs = torch.stack([levels & 15, levels >> 4], -1).flatten(1).float() - 8
    return pairs * scale.float()[:, None]


def pack(whole: Path, out: Path = KEPT, dense: Path = DENSE) -> None:
    """Write what `unpack` needs of the pipeline directory `whole` into `out`."""
    kept: dict[str, Tensor] = {}
    for part, file in WEIGHTS.items():
        before, after = (load_file(root / part / file) for root in (dense, whole))
        for name, value in after.items():
            key, old = f"{part}/{name}", before.get(name)
            if old is None or old.shape != value.shape:
                kept[f"{key}:whole"] = value.bfloat16()
                continue
            difference = value.float() - old.float()
            if value.ndim == 2 and value.shape[1] % 2 == 0:
                kept |= {f"{key}:{name}": each for name, each in packed(difference).items()}
            else:
                kept[f"{key}:vector"] = difference.bfloat16()
    for name in OWN:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(whole / name, out / name)
    save_file(kept, out / FILE)
    shutil.copymode(out / "model_index.json", out / FILE)  # whatever safetensors made it


def unpack(out: Path, kept: Path = KEPT, dense: Path = DENSE) -> None:
    """Write the whole FluxKontextPipeline directory `out`; dtypes are those of `dense`."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for root, names in ((kept, OWN), (dense, SHARED)):
        for name in names:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, part / name)
    stored = load_file(kept / FILE)
    for component, file in WEIGHTS.items():
        weights = load_file(dense / component / file)
        for name, value in weights.items():
            key = f"{component}/{name}"
            if f"{key}:whole" in stored:
                weights[name] = stored[f"{key}:whole"].to(value.dtype)
                continue
            if f"{key}:vector" in stored:
                difference = stored[f"{key}:vector"].float()
            else:
                difference = unpacked(stored[f"{key}:levels"], stored[f"{key}:scale"])
            weights[name] = (value.float() + difference).to(value.dtype)
        save_file(weights, part / component / file, {"format": "pt"})
    replace_dir(part, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="the whole pipeline, to write or to read")
    parser.add_argument("--pack", action="store_true", help="read it, and write what is kept")
    parser.add_argument("--kept", type=Path, default=KEPT, help="(%(default)s)")
    args = parser.parse_args()
    if args.pack:
        pack(args.directory, args.kept)
    else:
        unpack(args.directory, args.kept)
    print(f"{args.kept if args.pack else args.directory} is ready", flush=True)


if __name__ == "__main__":
    main()
