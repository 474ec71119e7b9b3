"""The text encoders of a shapes teacher learn the words of instructions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from scripts.teacher.loop import Run, train
from scripts.teacher.subject import Subject
from scripts.teacher.text import TextStage, Tokenizers, load_text, make_tokenizers, text_loss


def train_words(run: Run, subject: Subject, init: Path, steps: int) -> tuple[TextStage, Tokenizers]:
    """Frozen encoders and their tokenizers: those of `init`, with more words, trained on.

    Every word that both tokenizers know keeps its embedding, so that what the encoders say of a
    thing stays close to what the transformer of `init` has learnt to read.
    """
    old, known = load_text(init, subject, "cpu")
    tokenizers = make_tokenizers(subject)
    stage = TextStage(len(tokenizers[0]), len(tokenizers[1]), subject)
    with torch.no_grad():
        for new_part, old_part, new_words, old_words in (
            (stage.clip, old.clip, tokenizers[0], known[0]),
            (stage.t5, old.t5, tokenizers[1], known[1]),
        ):
            places = {**old_words.get_vocab()}
            rows = old_part.get_input_embeddings().weight
            table = new_part.get_input_embeddings().weight
            fresh = rows.mean(0) + rows.std(0) * torch.randn(
                table.shape, generator=run.generator(23_000_003, 0)
            )
            for word, i in new_words.get_vocab().items():
                fresh[i] = rows[places[word]] if word in places else fresh[i]
            resized(old_part, len(table))
            new_part.load_state_dict(old_part.state_dict())
            new_part.get_input_embeddings().weight.copy_(fresh)
    stage.to(run.device)
    loss_of = text_loss(run, stage, tokenizers, subject)
    train(run, "text", stage, loss_of, steps=steps, lr=7e-4, decay_share=0.5)
    return stage.eval().requires_grad_(False), tokenizers


def resized(encoder: nn.Module, words: int) -> None:
    """Give an encoder's table of embeddings `words` rows, in place."""
    encoder.resize_token_embeddings(words, mean_resizing=False)
