"""A synthetic FLUX.2 pipeline of a published size: real classes, real shapes, random weights.

    python -m scripts.bench.random_flux2 OUT [--model flux2-klein-4b] [--seed 0] [--shard-gb 2]

[klein] 4B or 9B, distilled: transformer, Qwen3 and VAE have all their layers (15.9 GB in bfloat16
for 4B); the tokenizer has few tokens, and a template of Qwen3's form. Written tensor by tensor as
scripts.bench.random_flux does.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from scripts.bench.random_flux import split, values

# read: the published configs
QWEN3 = {
    "flux2-klein-4b": {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "flux2-klein-9b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
}
ALL_QWEN3 = {
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
LENGTH = 512  # tokens of a text, its template among them


def main(argv: list[str] | None = None) -> int:
    """Parse, write, say how long it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=QWEN3, default="flux2-klein-4b", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=2.0, help="(%(default)s)")
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"{options.out} exists; choose another directory, or remove it")
    work = options.out.with_name(options.out.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    began = time.monotonic()
    size = surroundings(work, options.model)
    for folder, model in models(options.model).items():
        if folder == "transformer":
            model.save_config(work / folder)
            stem = "diffusion_pytorch_model"
        else:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(work / folder)
            stem = "model"
        size += write(model, work / folder, stem, options.seed, int(options.shard_gb * 1e9))
    work.rename(options.out)
    seconds = time.monotonic() - began
    print(f"{options.out}: {size / 1e9:.2f} GB in {seconds:.0f} s")
    return 0


def models(name: str) -> dict[str, Any]:
    """The transformer and Qwen3 on the meta device, by folder."""
    import torch
    from diffusers import Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from d2m.plan.model_config import shipped_configs

    config = json.loads(shipped_configs()[name].read_text())["transformer"]
    with torch.device("meta"):
        fields = {key: value for key, value in config.items() if not key.startswith("_")}
        transformer = Flux2Transformer2DModel(**fields)
        encoder = Qwen3ForCausalLM(Qwen3Config(**ALL_QWEN3, **QWEN3[name], dtype="bfloat16"))
        encoder.tie_weights()
    return {"transformer": transformer, "text_encoder": encoder}


def write(model: Any, folder: Path, stem: str, seed: int, limit: int) -> int:
    """Shards and index of a model's parameters, each once; their bytes."""
    from d2m.shards import write_shard
    from runtime.files.atomic import write_json

    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    shards = list(split(shapes, limit))
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    folder.mkdir(parents=True, exist_ok=True)
    for number, (file, names) in enumerate(zip(files, shards)):
        print(f"\r{folder.name} {number + 1}/{len(shards)}", end="", file=sys.stderr, flush=True)
        write_shard(folder / file, {name: values(name, shapes[name], seed) for name in names})
    print(file=sys.stderr)
    size = sum(2 * math.prod(shape) for shape in shapes.values())
    where = {name: file for file, names in zip(files, shards) for name in names}
    index = {"metadata": {"total_size": size}, "weight_map": where}
    write_json(folder / f"{stem}.safetensors.index.json", index)
    return size


def surroundings(folder: Path, name: str) -> int:
    """Scheduler, VAE of the published size, tokenizer, index; the VAE's bytes."""
    import torch
    from diffusers import AutoencoderKLFlux2

    from d2m.families.generation_defaults import write_defaults
    from tests.tiny.flux2 import qwen3_tokenizer, scheduler
    from tests.tiny.pipeline import randomize

    tokenizer = qwen3_tokenizer()
    tokenizer.model_max_length = LENGTH
    tokenizer.save_pretrained(folder / "tokenizer")
    vae = randomize(AutoencoderKLFlux2(), 0).to(torch.bfloat16)
    vae.save_pretrained(folder / "vae")
    scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": True,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_defaults(folder, height=1024, width=1024, max_sequence_length=LENGTH)
    return sum(2 * parameter.numel() for parameter in vae.parameters())


if __name__ == "__main__":
    sys.exit(main())
