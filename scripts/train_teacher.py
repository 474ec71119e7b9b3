#!/usr/bin/env python
"""Make the dense teacher `models/shapes-dense` from nothing: VAE, text encoders, flow-matching transformer, guidance distillation.

    python scripts/train_teacher.py --out models/shapes-dense --work runs/teacher

Four stages, each with its own checkpoint under --work (safetensors, never pickle); a killed run goes on where it stopped
when the same command is given again. The result is a genuine diffusers FluxPipeline directory in bf16.

The stages mirror how FLUX.1 [dev] came to be (ours, in miniature): a flow-matching model trained with caption dropout and
then distilled so that one forward pass with a guidance embedding draws what two passes of classifier-free guidance would.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from calib.render import render_batch
from calib.world import (
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    World,
    sample_scene,
    vocabulary,
)

LENGTH = 16  # text tokens: the longest caption has 14 words, CLIP adds two marks
# Scenes that need binding or counting are learnt last, so they are shown more often (ours).
SHARE = {
    "single_object": 0.06,
    "two_object": 0.18,
    "counting": 0.2,
    "colours": 0.1,
    "position": 0.24,
    "colour_attribution": 0.22,
}


# ---------------------------------------------------------------- checkpoints
def save_state(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Whole or not at all: written beside, synced, renamed. The numbers that are not tensors travel in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(
        {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in tensors.items()
        },
        part,
        metadata={"meta": json.dumps(meta)},
    )
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, path)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return load_file(path), json.loads(f.metadata()["meta"])


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    return {
        f"opt{n}.{i}.{k}": v
        for n, optimizer in enumerate(optimizers)
        for i, entry in optimizer.state_dict()["state"].items()
        for k, v in entry.items()
        if torch.is_tensor(v)
    }


def restore_optimizers(
    optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]
) -> None:
    for n, optimizer in enumerate(optimizers):
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt{n}."):
                _, i, name = key.split(".", 2)
                state.setdefault(int(i), {})[name] = value
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )


def make_optimizers(model: torch.nn.Module, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon`, the matrices inside attention and feed-forward go to Muon instead (same learning rate, matched RMS)."""
    hidden = [
        p
        for n, p in model.named_parameters()
        if muon and p.ndim == 2 and "blocks." in n and "norm" not in n
    ]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def train(
    name: str,
    model: torch.nn.Module,
    loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    *,
    work: Path,
    steps: int,
    lr: float,
    warmup: int = 100,
    decay_share: float = 0.3,
    muon: bool = False,
    ema_decay: float = 0.0,
    save_every: float = 60.0,
    snapshot: Callable[[torch.nn.Module, int], None] | None = None,
    snapshot_every: int = 0,
) -> torch.nn.Module:
    """One loop for every stage: warm-up, constant, linear decay to zero over the last `decay_share` of the steps.

    `loss_of(step)` must depend on nothing but the weights and the step, so that a resumed run goes on as if never stopped.
    Returns the EMA of the model (the model itself where ema_decay is 0). The curve goes to <work>/<name>.jsonl.
    """
    done = work / f"{name}.safetensors"
    ema = copy.deepcopy(model).requires_grad_(False) if ema_decay else model
    optimizers = make_optimizers(model, lr, muon)
    first = 0
    if done.exists():
        tensors, meta = load_state(done)
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        if ema_decay:
            ema.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
        restore_optimizers(optimizers, tensors)
        first = meta["step"]

    def checkpoint(step: int) -> None:
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        if ema_decay:
            tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
        save_state(done, tensors | optimizer_tensors(optimizers), {"step": step})

    pairs = list(zip(ema.parameters(), model.parameters(), strict=True))
    started = saved = time.time()
    seen: list[float] = []
    log = open(work / f"{name}.jsonl", "a")  # noqa: SIM115 - closed below, open for the whole loop
    for step in range(first, steps):
        rate = lr * min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay_share * steps))
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = rate
        loss, extra = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema_decay:
            keep = min(ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - keep)
        seen.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            elapsed = time.time() - started
            left = elapsed / (step + 1 - first) * (steps - step - 1)
            row = {"step": step + 1, "loss": round(sum(seen) / len(seen), 6), "lr": rate} | extra
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(
                f"{name} {step + 1}/{steps} loss {row['loss']:.5f} {extra} elapsed {elapsed:.0f}s left {left:.0f}s",
                flush=True,
            )
            seen = []
        if time.time() - saved > save_every or step + 1 == steps:
            checkpoint(step + 1)
            saved = time.time()
        if snapshot and snapshot_every and (step + 1) % snapshot_every == 0:
            snapshot(ema, step + 1)
    log.close()
    return ema.eval()


# ---------------------------------------------------------------- data
def scenes_of(world: World, n: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(CATEGORIES), n, p=[SHARE[c] for c in CATEGORIES])
    return [sample_scene(world, rng, "train", CATEGORIES[i]) for i in picks]


def images_of(world: World, scenes: list[Scene], seed: int) -> torch.Tensor:
    """uint8 [N, 3, S, S]"""
    images = render_batch(scenes, world, np.random.default_rng(seed + 1), "train")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def as_float(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


# ---------------------------------------------------------------- stage 1: VAE
def make_vae(world: World) -> AutoencoderKL:
    levels = 3 if world.size == 32 else 4
    widths = (16, 32, 64, 64)[:levels]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4 if world.size == 32 else 16,
        norm_num_groups=8,
        sample_size=world.size,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, args: argparse.Namespace) -> Callable:
    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        g = torch.Generator().manual_seed(1_000_003 * args.seed + step)
        x = as_float(images[torch.randint(len(images), (64,), generator=g)]).to(args.device)
        with autocast(args):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=g).to(mean)
            y = vae.decode(z).sample.float()
        mse = F.mse_loss(y, x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        # The edges decide what the verifier sees: L1 keeps them sharp, MSE keeps the flat colours right.
        loss = F.l1_loss(y, x) + 4 * mse + 1e-3 * kl
        return loss, {"psnr": round(10 * math.log10(4 / max(mse.item(), 1e-9)), 2)}

    return loss_of


def autocast(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    return (
        torch.autocast(args.device.split(":")[0], dtype=torch.bfloat16)
        if args.bf16
        else contextlib.nullcontext()
    )


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Latent means, float32 [N, C, h, w]."""
    rows = []
    for chunk in images.split(256):
        with autocast(args):
            rows.append(vae.encode(as_float(chunk).to(args.device)).latent_dist.mean.float().cpu())
    return torch.cat(rows)


# ---------------------------------------------------------------- stage 2: text
def make_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Real tokenizers whose vocabulary is the world's words: every word is one token, other words fall into letters."""
    words = vocabulary()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(x + "</w>" for x in letters)]
    pieces += [p for p in sorted(learnt["vocab"], key=learnt["vocab"].get) if p not in set(pieces)]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in learnt["merges"]]
    clip = CLIPTokenizer(
        vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=LENGTH
    )
    t5_pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    t5_pieces += [("▁" + w, -2.0) for w in words] + [("▁", -8.0)] + [(x, -10.0) for x in letters]
    t5 = T5TokenizerFast(vocab=t5_pieces, extra_ids=0, model_max_length=LENGTH)
    return clip, t5


class TextStage(torch.nn.Module):
    """Both encoders with heads that name a scene's attributes; the heads are thrown away after training."""

    def __init__(self, clip_vocab: int, t5_vocab: int):
        super().__init__()
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=clip_vocab, hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=t5_vocab, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
                feed_forward_proj="gated-gelu", relative_attention_num_buckets=16, relative_attention_max_distance=LENGTH,
                pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
        self.clip_heads = torch.nn.Linear(64, sum(ATTRIBUTES))
        self.t5_heads = torch.nn.Linear(128, sum(ATTRIBUTES))

    def encode(
        self, clip_ids: torch.Tensor, t5_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As FluxPipeline does: CLIP pooled [B, 64], T5 sequence [B, LENGTH, 128], no attention mask."""
        return self.clip(clip_ids).pooler_output, self.t5(t5_ids).last_hidden_state


ATTRIBUTES = (
    len(CATEGORIES) + 1,
    7,
    len(SHAPES) + 1,
    len(COLOURS) + 1,
    len(SHAPES) + 1,
    len(COLOURS) + 1,
    len(RELATIONS) + 1,
)


def attributes(scene: Scene | None) -> list[int]:
    """What the heads predict: category, count, shape and colour of both things, relation; all "none" for an empty caption."""
    if scene is None:
        return [n - 1 for n in ATTRIBUTES]
    shapes, colours = list(SHAPES), list(COLOURS)
    second = scene.things[1] if len(scene.things) > 1 else None
    first = scene.things[0]
    return [
        CATEGORIES.index(scene.category),
        len(scene.things) - 1,
        shapes.index(first.shape),
        colours.index(first.colour) if first.colour else len(colours),
        shapes.index(second.shape) if second else len(shapes),
        colours.index(second.colour) if second and second.colour else len(colours),
        RELATIONS.index(scene.relation) if scene.relation else len(RELATIONS),
    ]


def tokenise(tokenizers: tuple, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [
        t(captions, padding="max_length", max_length=LENGTH, truncation=True).input_ids
        for t in tokenizers
    ]
    return torch.tensor(ids[0]), torch.tensor(ids[1])


def text_loss(
    stage: TextStage, tokenizers: tuple, scenes: list[Scene], args: argparse.Namespace
) -> Callable:
    ids = tokenise(tokenizers, [s.caption for s in scenes] + [""])
    labels = torch.tensor([attributes(s) for s in scenes] + [attributes(None)])

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        g = torch.Generator().manual_seed(7_000_003 * args.seed + step)
        rows = torch.randint(len(scenes), (128,), generator=g)
        rows[:2] = len(scenes)  # the empty caption, which caption dropout uses later
        pooled, sequence = stage.encode(ids[0][rows].to(args.device), ids[1][rows].to(args.device))
        target = labels[rows].to(args.device)
        loss, right = torch.zeros((), device=args.device), 1.0
        clip_parts = stage.clip_heads(pooled).split(ATTRIBUTES, -1)
        # Every T5 token must know the whole scene: FLUX gives text tokens no position, so order must live in the tokens.
        t5_parts = stage.t5_heads(sequence).split(ATTRIBUTES, -1)
        for i in range(len(ATTRIBUTES)):
            loss = loss + F.cross_entropy(clip_parts[i], target[:, i])
            loss = loss + F.cross_entropy(
                t5_parts[i].transpose(1, 2), target[:, i, None].expand(-1, LENGTH)
            )
            right = min(right, (clip_parts[i].argmax(-1) == target[:, i]).float().mean().item())
        return loss, {"worst_clip_accuracy": round(right, 3)}

    return loss_of


# ---------------------------------------------------------------- stages 3 and 4: the transformer
def make_transformer(world: World) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=16 if world.size == 32 else 64, num_layers=6, num_single_layers=12, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    for (
        name,
        p,
    ) in (
        model.named_parameters()
    ):  # adaLN-zero: every block starts as the identity, the output at zero
        if (
            "norm1" in name
            or "norm.linear" in name
            or "norm_out.linear" in name
            or name.startswith("proj_out")
        ):
            torch.nn.init.zeros_(p)
    return model


def flow_batch(
    latents: torch.Tensor, shape: tuple[float, float], g: torch.Generator, args: argparse.Namespace
) -> tuple:
    """Noised packed latents, sigma and velocity target: x_sigma = (1 - sigma) x + sigma noise, v = noise - x (FLUX's)."""
    x = latents.to(args.device)
    noise = torch.randn(latents.shape, generator=g).to(args.device)
    sigma = torch.sigmoid(torch.randn(len(latents), generator=g) * shape[1] + shape[0]).to(
        args.device
    )
    s = sigma[:, None, None]
    return (1 - s) * x + s * noise, sigma, noise - x


def forward(
    model: FluxTransformer2DModel,
    x: torch.Tensor,
    sigma: torch.Tensor,
    guidance: torch.Tensor,
    text: dict,
    ids: dict,
) -> torch.Tensor:
    return model(
        hidden_states=x, timestep=sigma, guidance=guidance, return_dict=False, **text, **ids
    )[0].float()


class Cache:
    """Packed latents of every scene and the embeddings of every distinct caption (frozen encoders: encoded once)."""

    def __init__(
        self,
        latents: torch.Tensor,
        captions: list[str],
        stage: TextStage,
        tokenizers: tuple,
        args: argparse.Namespace,
    ):
        b, c, h, w = latents.shape
        self.packed = FluxPipeline._pack_latents(latents, b, c, h, w)
        distinct = sorted(set(captions) | {""})
        index = {c: i for i, c in enumerate(distinct)}
        self.rows = torch.tensor([index[c] for c in captions])
        self.empty = index[""]
        pooled, sequence = [], []
        with torch.no_grad():
            for i in range(0, len(distinct), 256):
                ids = tokenise(tokenizers, distinct[i : i + 256])
                p, s = stage.encode(ids[0].to(args.device), ids[1].to(args.device))
                pooled.append(p)
                sequence.append(s)
        self.pooled, self.sequence = torch.cat(pooled), torch.cat(sequence)
        self.ids = {
            "img_ids": FluxPipeline._prepare_latent_image_ids(
                1, h // 2, w // 2, args.device, torch.float32
            ),
            "txt_ids": torch.zeros(LENGTH, 3, device=args.device),
        }

    def text(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "pooled_projections": self.pooled[rows],
            "encoder_hidden_states": self.sequence[rows],
        }


def compiled_once(*models: FluxTransformer2DModel) -> Callable[[], None]:
    """Compiles the blocks at the first call: after the EMA's deep copy, which must be of plain modules. 1.7x on a CPU core."""
    waiting = list(models)

    def go() -> None:
        while waiting:
            waiting.pop().compile_repeated_blocks(dynamic=False)

    return go


def flow_loss(model: FluxTransformer2DModel, cache: Cache, args: argparse.Namespace) -> Callable:
    ready = compiled_once(*([model] if args.compile else []))

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        ready()
        g = torch.Generator().manual_seed(13_000_003 * args.seed + step)
        pick = torch.randint(len(cache.rows), (args.batch,), generator=g)
        rows = torch.where(torch.rand(args.batch, generator=g) < 0.1, cache.empty, cache.rows[pick])
        x, sigma, target = flow_batch(cache.packed[pick], (1.0, 1.2), g, args)
        with autocast(args):
            v = forward(
                model,
                x,
                sigma,
                torch.ones(args.batch, device=args.device),
                cache.text(rows),
                cache.ids,
            )
        return F.mse_loss(v, target), {}

    return loss_of


def guidance_loss(
    model: FluxTransformer2DModel,
    teacher: FluxTransformer2DModel,
    cache: Cache,
    args: argparse.Namespace,
) -> Callable:
    """Guidance distillation: one pass with guidance g learns v_empty + g (v_caption - v_empty) of the undistilled model."""

    ready = compiled_once(*([model, teacher] if args.compile else []))

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        ready()
        g = torch.Generator().manual_seed(17_000_003 * args.seed + step)
        pick = torch.randint(len(cache.rows), (args.batch,), generator=g)
        x, sigma, _ = flow_batch(cache.packed[pick], (1.0, 1.2), g, args)
        scale = (1 + 4 * torch.rand(args.batch, generator=g)).to(args.device)
        rows = cache.rows[pick]
        with torch.no_grad(), autocast(args):
            both = cache.text(torch.cat([rows, torch.full_like(rows, cache.empty)]))
            v = forward(
                teacher,
                x.repeat(2, 1, 1),
                sigma.repeat(2),
                torch.ones(2 * len(x), device=args.device),
                both,
                cache.ids,
            )
            caption, empty = v.chunk(2)
            target = empty + scale[:, None, None] * (caption - empty)
        with autocast(args):
            v = forward(model, x, sigma, scale, cache.text(rows), cache.ids)
        return F.mse_loss(v, target), {}

    return loss_of


# ---------------------------------------------------------------- the pipeline directory
def save_pipeline(
    out: Path,
    vae: AutoencoderKL,
    stage: TextStage,
    tokenizers: tuple,
    transformer: FluxTransformer2DModel,
    world: World,
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(  # FLUX.1 [dev]'s own settings
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipe = FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=stage.clip, tokenizer=tokenizers[0], text_encoder_2=stage.t5,
        tokenizer_2=tokenizers[1], transformer=transformer,
    )  # fmt: skip
    part = out.with_name(out.name + ".part")
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    # Transformers 5 loads an encoder in the dtype it was saved in, diffusers loads its models in float32: with the (small)
    # encoders in float32, FluxPipeline.from_pretrained(out) draws without being told a dtype.
    half.text_encoder.float()
    half.text_encoder_2.float()
    half.save_pretrained(part, safe_serialization=True)
    size = world.size
    defaults = {
        "height": size,
        "width": size,
        "num_inference_steps": 16,
        "guidance_scale": 3.5,
        "max_sequence_length": LENGTH,
    }
    (part / "defaults.json").write_text(json.dumps(defaults, indent=2, sort_keys=True) + "\n")
    for name in (
        "README.md",
        "scores.json",
        "training.json",
        "training.svg",
    ):  # what a person or another script added stays
        if (out / name).exists():
            (part / name).write_bytes((out / name).read_bytes())
    if out.exists():
        old = out.with_name(out.name + ".old")
        os.replace(out, old)
        os.replace(part, out)
        for root, _, files in os.walk(old, topdown=False):
            for f in files:
                os.unlink(os.path.join(root, f))
            os.rmdir(root)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("models/shapes-dense"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/teacher"),
        help="checkpoints; give the same one to resume",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument(
        "--scenes", type=int, default=100_000, help="training images, drawn once and encoded once"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--flow-steps", type=int, default=7500)
    parser.add_argument("--guidance-steps", type=int, default=700)
    parser.add_argument("--lr", type=float, default=1.6e-3)
    parser.add_argument(
        "--snapshot-every",
        type=int,
        default=1000,
        help="write the pipeline every so many flow steps (0: never)",
    )
    parser.add_argument(
        "--snapshot", type=Path, default=None, help="where snapshots go (default: <work>/snapshot)"
    )
    parser.add_argument(
        "--muon", action="store_true", help="Muon for the blocks' matrices instead of AdamW"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--until", choices=("vae", "text", "flow", "guidance"), default="guidance")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.enable_flash_sdp(
        args.device != "cpu"
    )  # at 32 tokens the CPU's flash kernel is slower than plain products
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    for _ in stages(args, World(size=args.size)):
        pass
    print(f"{args.out} is ready", flush=True)


def stages(args: argparse.Namespace, world: World) -> Iterator[str]:
    print(f"drawing {args.scenes} training scenes", flush=True)
    scenes = scenes_of(world, args.scenes, args.seed)
    images = images_of(world, scenes, args.seed)

    vae = make_vae(world).to(args.device)
    train(
        "vae",
        vae,
        vae_loss(vae, images, args),
        work=args.work,
        steps=args.vae_steps,
        lr=2.5e-3,
        decay_share=0.5,
    )
    vae.eval().requires_grad_(False)
    yield "vae"
    if args.until == "vae":
        return

    tokenizers = make_tokenizers()
    stage = TextStage(len(tokenizers[0]), len(tokenizers[1])).to(args.device)
    text_scenes = scenes_of(world, 20_000, args.seed + 5)
    train(
        "text",
        stage,
        text_loss(stage, tokenizers, text_scenes, args),
        work=args.work,
        steps=args.text_steps,
        lr=2e-3,
        decay_share=0.5,
    )
    stage.eval().requires_grad_(False)
    yield "text"
    if args.until == "text":
        return

    kept = (
        args.work / "latents.safetensors"
    )  # minutes of encoding that a resumed run need not repeat
    if not kept.exists():
        save_state(kept, {"latents": encode_all(vae, images, args)}, {})
    latents = load_state(kept)[0]["latents"]
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 6),
        scaling_factor=round(1 / latents.std().item(), 6),
    )
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    cache = Cache(latents, [s.caption for s in scenes], stage, tokenizers, args)
    snapshot_dir = args.snapshot or args.work / "snapshot"

    def snapshot(ema: torch.nn.Module, step: int) -> None:
        save_pipeline(snapshot_dir, vae, stage, tokenizers, ema, world)

    model = make_transformer(world).to(args.device)
    ema = train(
        "flow", model, flow_loss(model, cache, args), work=args.work, steps=args.flow_steps, lr=args.lr, warmup=200, muon=args.muon,
        ema_decay=0.999, snapshot=snapshot, snapshot_every=args.snapshot_every,
    )  # fmt: skip
    yield "flow"
    if args.until == "flow":
        return
    teacher = ema.requires_grad_(False)
    student = copy.deepcopy(ema).requires_grad_(True)
    ema = train(
        "guidance", student, guidance_loss(student, teacher, cache, args), work=args.work, steps=args.guidance_steps,
        lr=args.lr / 4, warmup=50, decay_share=0.7, ema_decay=0.99, muon=args.muon, snapshot=snapshot, snapshot_every=args.snapshot_every,
    )  # fmt: skip
    yield "guidance"
    save_pipeline(args.out, vae, stage, tokenizers, ema, world)


if __name__ == "__main__":
    main()
