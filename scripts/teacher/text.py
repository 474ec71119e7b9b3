"""Stage 2: tokenizers, and a CLIP and a T5 encoder that learn to name a scene by its caption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from scripts.teacher.loop import Loss, Run, train
from scripts.teacher.subject import Captioned, Subject

BATCH = 128  # captions per step

Tokenizers = tuple[CLIPTokenizer, T5TokenizerFast]


def make_tokenizers(subject: Subject) -> Tokenizers:
    """Real tokenizers: every word of the world is one token, other words fall into letters.

    The same ones in every process, since a resumed run makes them again. BpeTrainer alone would
    not do that: it numbers the letters that end a word in the order of a hash map and breaks ties
    by those numbers, so that "of" and "ou" swap ids. Given as special tokens they have numbers from
    the start; vowels first gives the ids that the committed teacher had in its flow stage.
    """
    words, letters = list(subject.words), list(ascii_lowercase)
    ends = [letter + "</w>" for letter in letters]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=32768,
        min_frequency=1,
        end_of_word_suffix="</w>",
        special_tokens=letters + sorted(ends, key=lambda end: end[0] not in "aeiou"),
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *ends]
    pieces += [p for p in sorted(learnt["vocab"], key=learnt["vocab"].get) if p not in set(pieces)]
    merges = [tuple(pair) for pair in learnt["merges"]]
    numbered = {piece: i for i, piece in enumerate(pieces)}
    clip = CLIPTokenizer(vocab=numbered, merges=merges, model_max_length=subject.length)
    t5_pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    t5_pieces += [("▁" + w, -2.0) for w in words] + [("▁", -8.0)] + [(x, -10.0) for x in letters]
    return clip, T5TokenizerFast(vocab=t5_pieces, extra_ids=0, model_max_length=subject.length)


def tokenise(tokenizers: Tokenizers, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of CLIP and of T5, int64 [B, L] each, L the length they were made for."""
    length = tokenizers[0].model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    clip, t5 = (torch.tensor(t(list(captions), **options).input_ids) for t in tokenizers)
    return clip, t5


class TextStage(nn.Module):
    """Both encoders with heads that name a scene's attributes; the heads go after training."""

    def __init__(self, clip_vocab: int, t5_vocab: int, subject: Subject):
        super().__init__()
        clip = CLIPTextConfig(
            vocab_size=clip_vocab,
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=subject.length,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        t5 = T5Config(
            vocab_size=t5_vocab,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=32,
            relative_attention_max_distance=subject.length,
            pad_token_id=0,
            eos_token_id=1,
        )
        self.clip = CLIPTextModel(clip)
        self.t5 = T5EncoderModel(t5)
        self.clip_heads = nn.Linear(64, sum(subject.classes))
        self.t5_heads = nn.Linear(128, sum(subject.token_classes))

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """As FluxPipeline does, without a mask: CLIP's pooled [B, 64], T5's tokens [B, T, 128]."""
        return self.clip(clip_ids).pooler_output, self.t5(t5_ids).last_hidden_state


def train_text(run: Run, subject: Subject, steps: int) -> tuple[TextStage, Tokenizers]:
    """Frozen encoders and their tokenizers."""
    tokenizers = make_tokenizers(subject)
    stage = TextStage(len(tokenizers[0]), len(tokenizers[1]), subject).to(run.device)
    loss_of = text_loss(run, stage, tokenizers, subject)
    train(run, "text", stage, loss_of, steps=steps, lr=7e-4, decay_share=0.5)
    return stage.eval().requires_grad_(False), tokenizers


def load_text(init: Path, subject: Subject, device: str) -> tuple[TextStage, Tokenizers]:
    """Frozen encoders and tokenizers of the pipeline `init`; the heads mean nothing."""
    clip = CLIPTokenizer.from_pretrained(init / "tokenizer")
    t5 = T5TokenizerFast.from_pretrained(init / "tokenizer_2")
    stage = TextStage(len(clip), len(t5), subject)
    stage.clip = CLIPTextModel.from_pretrained(init / "text_encoder")
    stage.t5 = T5EncoderModel.from_pretrained(init / "text_encoder_2")
    return stage.to(device).float().eval().requires_grad_(False), (clip, t5)


def text_loss(run: Run, stage: TextStage, tokenizers: Tokenizers, subject: Subject) -> Loss:
    """Cross entropy of every attribute; logs CLIP's accuracy in the attribute it knows worst.

    Of captions other than the training pictures'.
    """
    scenes: Sequence[Captioned] = subject.draw(subject.captions, run.seed + 5)
    clip_ids, t5_ids = tokenise(tokenizers, [*(s.caption for s in scenes), ""])
    labels = torch.tensor([subject.attributes(s) for s in [*scenes, None]])
    tokens_say = torch.tensor([subject.tokens(s) for s in [*scenes, None]])

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        g = run.generator(7_000_003, step)
        rows = torch.randint(len(scenes), (BATCH,), generator=g)
        rows[:2] = len(scenes)  # the empty caption, which caption dropout uses later
        pooled, tokens = stage.encode(clip_ids[rows].to(run.device), t5_ids[rows].to(run.device))
        target, each = labels[rows].to(run.device), tokens_say[rows].to(run.device)
        loss, worst = torch.zeros((), device=run.device), 1.0
        for i, clip in enumerate(stage.clip_heads(pooled).split(subject.classes, -1)):
            loss = loss + F.cross_entropy(clip, target[:, i])
            worst = min(worst, (clip.argmax(-1) == target[:, i]).float().mean().item())
        for i, t5 in enumerate(stage.t5_heads(tokens).split(subject.token_classes, -1)):
            loss = loss + F.cross_entropy(t5.transpose(1, 2), each[..., i])
        return loss, {"worst_clip_accuracy": round(worst, 3)}

    return loss_of
