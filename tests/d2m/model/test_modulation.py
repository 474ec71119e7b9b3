"""Shared modulation: diffusers' interface, the published count, held once."""

import copy

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle

from d2m.model.modulation import SharedAdaLN, SharedModulation, norms, rank_of, share_adaln
from d2m.recipe.structure import AdaLN
from tests.tiny.pipeline import tiny_inputs, tiny_transformer

D = 32
F64 = torch.float64


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(("cls", "chunks"), [(AdaLayerNormZero, 6), (AdaLayerNormZeroSingle, 3)])
@pytest.mark.parametrize("rank", [None, D])
def test_it_computes_what_diffusers_norms_do(cls, chunks, rank):
    """single with the norm's own matrix and a table for its bias; lowrank with a unit basis."""
    dense = cls(D).to(F64)
    shared = SharedModulation(D, rank or 6 * D, rank is None, dtype=F64)
    norm = SharedAdaLN(shared, D, chunks, rank)
    with torch.no_grad():
        if rank is None:
            shared.linear.weight.normal_()
            shared.linear.weight[: chunks * D] = dense.linear.weight
            shared.linear.bias.zero_()
            norm.table.copy_(dense.linear.bias)
        else:
            shared.linear.weight.copy_(torch.eye(D))
            norm.up.load_state_dict(dense.linear.state_dict())
    x, emb = noise(3, 5, D), noise(3, D, seed=1)
    actual, expected = norm(x, emb=emb), dense(x, emb=emb)
    assert len(actual) == len(expected) == chunks - 1
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="got no emb"):
        norm(x)


def test_full_changes_nothing():
    model = tiny_transformer()
    before = list(model.named_modules())
    assert share_adaln(model, AdaLN()) is model and list(model.named_modules()) == before


@pytest.mark.parametrize("mode", ["single", "lowrank"])
def test_structure_and_count(mode):
    dense, model = tiny_transformer(), share_adaln(tiny_transformer(), AdaLN(mode))
    assert norms(model) == norms(dense) and len(norms(model)) == 2 * 2 + 2
    assert all(isinstance(model.get_submodule(name), SharedAdaLN) for name in norms(model))
    assert type(model.norm_out) is type(dense.norm_out)
    names = set(model.state_dict())
    assert not any(name.endswith("norm1.linear.weight") for name in names)
    assert sum(name.startswith("modulation.") for name in names) == (2 if mode == "single" else 1)
    part = "table" if mode == "single" else "up.weight"
    assert f"transformer_blocks.0.norm1_context.{part}" in names
    assert f"single_transformer_blocks.1.norm.{part}" in names
    outside = sum(p.numel() for n, p in dense.named_parameters() if ".linear." not in n)
    outside += sum(p.numel() for p in dense.norm_out.parameters())
    mine = sum(p.numel() for p in model.parameters()) - outside
    chunks = 12 * 2 + 3 * 2
    single = 6 * (D * D + D) + chunks * D
    assert mine == single if mode == "single" else mine <= single
    assert torch.isfinite(model(**tiny_inputs()).sample).all()


def test_published_count_on_the_meta_device():
    """FLUX.1 [dev]: 3.2 B of modulation become 58 M (paper.md's formula)."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        before = sum(p.numel() for p in model.parameters())
        share_adaln(model, AdaLN("single"))
    d, chunks = 3072, 12 * 19 + 3 * 38
    after = sum(p.numel() for p in model.parameters())
    assert before - after == chunks * d * (d + 1) - (6 * (d * d + d) + chunks * d)
    assert before == 11_901_408_320 and rank_of(AdaLN("lowrank"), d, chunks) == 53


def test_ranks():
    assert rank_of(AdaLN("single"), D, 30) is None
    assert rank_of(AdaLN("lowrank", 32), D, 30) == 32
    assert rank_of(AdaLN("lowrank"), D, 30) == 6 * 33 // 31
    with pytest.raises(ValueError, match="adaln.rank is 33; expected 1 to 32"):
        rank_of(AdaLN("lowrank", 33), D, 30)


def test_the_shared_answer_is_kept_for_one_embedding():
    shared = SharedModulation(D, D, True)
    calls = []
    shared.linear.register_forward_hook(lambda *args: calls.append(1))
    first, second = torch.randn(2, D), torch.randn(2, D)
    with torch.no_grad():
        assert shared(first) is shared(first) and len(calls) == 1
        assert not torch.equal(shared(second), shared(first)) and len(calls) == 3
        old = shared(first).clone()
        shared.linear.weight.mul_(2)  # other weights, other answer
        assert not torch.equal(shared(first), old)
    count = len(calls)
    shared(first).sum().backward()
    shared(first).sum().backward()  # a graph of its own each time
    assert len(calls) == count + 2


def test_a_copy_shares_within_itself():
    model = share_adaln(tiny_transformer(), AdaLN("single"))
    other = copy.deepcopy(model)
    for each in (model, other):
        assert each.transformer_blocks[0].norm1._shared[0] is each.modulation
    assert other.modulation is not model.modulation
    assert sum("modulation" in name for name in model.state_dict()) == 2  # once in a state dict
