"""A synthetic pipeline of FLUX.1 [dev]'s size: real classes, real shapes, random weights.

    python -m scripts.bench.random_flux OUT [--blocks 19D+38S] [--seed 0] [--shard-gb 5]

The transformer is that of FLUX.1 [dev], block for block (24 GB in bfloat16); VAE and text encoders
have its interfaces (latent and embedding sizes, lengths, special tokens) and few layers,
so that the whole is convertible, exportable and usable on a small machine. Written tensor by
tensor, a shard at a time: memory stays under one shard. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.figures import ROOT

CONFIG = ROOT / "d2m/families/flux/configs/flux-dev.json"
LENGTHS = {"clip": 77, "t5": 512}


def main(argv: list[str] | None = None) -> int:
    """Parse, write, say how long it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", default="19D+38S", help="double and single (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=2.0, help="(%(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="sizes (%(default)s)")
    options = parser.parse_args(argv)
    blocks = re.fullmatch(r"(\d+)D\+(\d+)S", options.blocks)
    if not blocks:
        parser.error(f"--blocks is {options.blocks!r}, expected such as 19D+38S")
    if options.out.exists():
        parser.error(f"{options.out} exists; choose another directory, or remove it")
    config = json.loads(options.config.read_text())["transformer"]
    config |= dict(zip(("num_layers", "num_single_layers"), map(int, blocks.groups())))
    work = options.out.with_name(options.out.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    began = time.monotonic()
    surroundings(config, work)
    size = transformer(config, work / "transformer", options.seed, int(options.shard_gb * 1e9))
    work.rename(options.out)
    seconds = time.monotonic() - began
    print(f"{options.out}: a transformer of {size / 1e9:.2f} GB in {seconds:.0f} s")
    return 0


def transformer(config: dict[str, Any], folder: Path, seed: int, shard_bytes: int) -> int:
    """Write config and shards of the transformer; its size in bytes."""
    import torch
    from diffusers import FluxTransformer2DModel

    from d2m.shards import shard_name, write_index, write_shard

    with torch.device("meta"):
        fields = {key: value for key, value in config.items() if not key.startswith("_")}
        model = FluxTransformer2DModel(**fields)
    folder.mkdir(parents=True)
    model.save_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards = list(split(shapes, shard_bytes))
    files = [shard_name(i + 1, len(shards)) for i in range(len(shards))]
    for number, (file, names) in enumerate(zip(files, shards)):
        print(f"\rshard {number + 1}/{len(shards)}", end="", file=sys.stderr, flush=True)
        write_shard(folder / file, {name: values(name, shapes[name], seed) for name in names})
    print(file=sys.stderr)
    write_index(folder, files)
    return sum(2 * math.prod(shape) for shape in shapes.values())


def split(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[list[str]]:
    """Names in the model's order, in runs of at most `limit` bytes (or one tensor)."""
    run: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = 2 * math.prod(shape)
        if run and size + more > limit:
            yield run
            run, size = [], 0
        run.append(name)
        size += more
    yield run


def values(name: str, shape: tuple[int, ...], seed: int) -> Any:
    """One tensor in bfloat16, by seed and name alone.

    Matrices at 1 / sqrt(fan in), uniform (six times as fast as normal), norms' scales about
    1, biases small, modulation smaller: activations stay finite through 57 blocks.
    """
    import torch

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    noise = torch.empty(shape).uniform_(-1.7320508, 1.7320508, generator=generator)  # variance 1
    if len(shape) > 1:
        return noise.mul_(shape[1] ** -0.5 * (0.1 if ".linear." in name else 1)).bfloat16()
    return (1 + 0.1 * noise if name.endswith("weight") else 0.02 * noise).bfloat16()


def surroundings(config: dict[str, Any], folder: Path) -> None:
    """Scheduler, VAE, text encoders and tokenizers with the interfaces of FLUX.1 [dev]."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from d2m.families.generation_defaults import write_defaults
    from tests.tiny.pipeline import clip_tokenizer, t5_tokenizer

    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(LENGTHS["clip"]), t5_tokenizer(LENGTHS["t5"])
    clip.save_pretrained(folder / "tokenizer")
    t5.save_pretrained(folder / "tokenizer_2")
    pooled = config["pooled_projection_dim"]
    encoder = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=pooled,
        intermediate_size=pooled,
        num_hidden_layers=1,
        num_attention_heads=max(1, pooled // 64),
        max_position_embeddings=LENGTHS["clip"],
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
        projection_dim=pooled,
    )
    CLIPTextModel(encoder).save_pretrained(folder / "text_encoder")
    encoder_2 = T5Config(
        vocab_size=len(t5),
        d_model=config["joint_attention_dim"],
        d_kv=64,
        d_ff=256,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=t5.pad_token_id,
        eos_token_id=t5.eos_token_id,
        decoder_start_token_id=t5.pad_token_id,
    )
    T5EncoderModel(encoder_2).save_pretrained(folder / "text_encoder_2")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=config["in_channels"] // 4,
        norm_num_groups=4,
        sample_size=1024,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    vae.save_pretrained(folder / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_defaults(folder, height=1024, width=1024, max_sequence_length=LENGTHS["t5"])


if __name__ == "__main__":
    sys.exit(main())
