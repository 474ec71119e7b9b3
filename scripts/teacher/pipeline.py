"""The result: a FluxPipeline directory that diffusers loads as it loads any other."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from d2m.plan.model_config import read_json
from runtime.files.atomic import replace_dir, write_json
from scripts.teacher.subject import Subject
from scripts.teacher.text import TextStage, Tokenizers

# What a person or another script put beside the weights stays when they are written again.
KEPT = ("README.md", "scores.json", "training.json", "training.svg")


def save_pipeline(
    out: Path,
    subject: Subject,
    vae: AutoencoderKL,
    stage: TextStage,
    tokenizers: Tokenizers,
    transformer: FluxTransformer2DModel,
    guidance: float = 3.5,
    edits: bool = False,
) -> None:
    """Write `out` at once, bf16, with the world's defaults for generating in defaults.json.

    guidance: the default scale; 1 where no guidance has been distilled yet. edits: the transformer
    edits a reference image, so it is a FluxKontextPipeline.

    Transformers 5 loads an encoder in the dtype it was saved in, diffusers loads its models in
    float32: with the (small) encoders in float32, FluxPipeline.from_pretrained(out) generates
    without a dtype given.
    """
    # The scheduler of FLUX.1 [dev].
    shift: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5}
    shift |= {"max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = FlowMatchEulerDiscreteScheduler(**shift)
    (clip, t5), models = tokenizers, {"vae": vae, "transformer": transformer}
    encoders = {"text_encoder": stage.clip, "text_encoder_2": stage.t5}
    made = FluxKontextPipeline if edits else FluxPipeline
    pipe = made(scheduler, tokenizer=clip, tokenizer_2=t5, **encoders, **models)
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    half.text_encoder.float()
    half.text_encoder_2.float()
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # part of one, of a run that was killed
    half.save_pretrained(part, safe_serialization=True)
    for path in part.glob("*/config.json"):  # diffusers adds where a model was loaded from
        config = read_json(path)
        if config.pop("_name_or_path", None) is not None:
            write_json(path, config)
    defaults: dict[str, Any] = {
        "height": subject.size,
        "width": subject.size,
        "num_inference_steps": 16,
    }
    defaults |= {"guidance_scale": guidance, "max_sequence_length": subject.length}
    write_json(part / "defaults.json", defaults)
    for name in KEPT:
        if (out / name).exists():
            shutil.copyfile(out / name, part / name)
    replace_dir(part, out)
