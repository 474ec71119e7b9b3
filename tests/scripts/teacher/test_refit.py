"""Refitted embedders: the transformer of one pipeline reads another's text embeddings."""

from pathlib import Path

import pytest

pytest.importorskip("diffusers")
import torch

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def refit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from scripts.teacher.refit import refit

    return torch.no_grad()(refit)


def test_a_linear_change_of_the_embeddings_is_undone(refit) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(4000, 12, generator=generator)
    change = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q * 2
    new = old @ change + torch.randn(12, generator=generator)
    embedder = torch.nn.Linear(12, 7)
    expected = embedder(old).detach()
    assert (embedder(new) - expected).abs().max() > 1  # nothing like it before
    refit(embedder, new, old)
    assert (embedder(new) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_what_the_new_embeddings_do_not_say_becomes_the_mean(refit) -> None:
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(2000, 3, generator=generator) + 5
    embedder = torch.nn.Linear(3, 4)
    expected = embedder(old).mean(0).detach()
    refit(embedder, torch.zeros(2000, 3), old)
    assert (embedder(torch.zeros(1, 3))[0] - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_the_committed_transformer_reads_encoders_it_never_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untrained encoders even: nothing is said, but nothing explodes either."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from calib.shapes.world import World
    from scripts.teacher.refit import refitted
    from scripts.teacher.scenes import shapes_subject
    from scripts.teacher.text import TextStage, make_tokenizers, tokenise

    torch.manual_seed(2)
    subject = shapes_subject(World())
    tokenizers = make_tokenizers(subject)
    stage = TextStage(len(tokenizers[0]), len(tokenizers[1]), subject).eval()
    captions = [scene.caption for scene in subject.draw(300, 3)]
    dense = ROOT / "models/shapes-dense"
    model = refitted(dense, subject, captions, stage, tokenizers, "cpu")
    with torch.no_grad():
        pooled, tokens = stage.encode(*tokenise(tokenizers, captions[:8]))
        answer = model(
            hidden_states=torch.randn(8, 16, 16),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=torch.full((8,), 0.7),
            guidance=torch.ones(8),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(16, 3),
        ).sample
    assert answer.abs().max() < 20
