"""Mixture of Blocks: the router's formula, who runs what, the identity, and the gradients."""

import pytest
import torch

from d2m.model.block_group import (
    BlockGroup,
    Router,
    SkippedBlock,
    block_groups,
    set_kappa,
    straight_through,
)
from d2m.model.surgery import identity_error, sparse_ffns
from d2m.recipe.structure import Blocks
from tests.tiny.pair import BLOCKS, grouped_pair
from tests.tiny.pipeline import tiny_inputs

D = 32
F64 = torch.float64


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def noise(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def streams(batch=6, dtype=F64):
    """Keyword arguments of a block at D = 32, with 16 image and 8 text tokens."""
    text = noise(batch, 8, D, seed=1, dtype=dtype)
    return {
        "hidden_states": noise(batch, 16, D, seed=2, dtype=dtype),
        "encoder_hidden_states": text,
        "temb": noise(batch, D, seed=3, dtype=dtype),
    }


def calls_of(model):
    """A dict that counts the samples of every call of a grouped block, by dense index."""
    counts = {}
    for name, group in block_groups(model).items():
        for index, block in group.blocks.items():
            key = (name.split(".")[0], int(index))
            counts[key] = []

            def count(module, args, kwargs, key=key):
                counts[key].append(kwargs["hidden_states"].shape[0])

            block.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def sample(inputs, b):
    """The inputs of sample b alone; positions are everyone's."""
    return {name: v if name.endswith("_ids") else v[b : b + 1] for name, v in inputs.items()}


# ---------------------------------------------------------------- the router


@pytest.mark.parametrize(("dtype", "limit"), [(F64, 1e-14), (torch.float32, 1e-5)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_router_is_the_papers_formula(alpha, dtype, limit):
    router = Router(D, 3, alpha, dtype)
    inputs = streams(dtype=dtype)
    x, c, y = (inputs[n].double() for n in ("hidden_states", "encoder_hidden_states", "temb"))
    w_x, w_y = router.tokens.weight.double(), router.embedding.weight.double()
    pooled = torch.cat([x.mean(1), c.mean(1)], dim=1)
    expected = alpha * pooled @ w_x.T + (1 - alpha) * y @ w_y.T
    actual = router(**inputs)
    assert actual.shape == (6, 3) and actual.dtype == dtype
    assert relative(actual, expected) < limit
    assert sum(p.numel() for p in router.parameters()) == 3 * 3 * D


def test_router_stays_float32_in_bfloat16():
    router = Router(D, 3, 0.5, torch.bfloat16)
    inputs = streams(dtype=torch.bfloat16)
    assert router.tokens.weight.dtype == torch.float32
    logits = router(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        again = router(**inputs)
    assert logits.dtype == again.dtype == torch.float32 and torch.equal(logits, again)


def test_windows_are_means_of_neighbours():
    student, _ = grouped_pair(dtype=F64)
    group = student.transformer_blocks[1]
    logits = group.router(**streams())
    assert torch.equal(group.window_logits(**streams()), logits)
    group.kappa = 2
    expected = torch.stack([logits[:, :2].mean(1), logits[:, 1:].mean(1)], dim=1)
    assert relative(group.window_logits(**streams()), expected) < 1e-14


# ---------------------------------------------------------------- who runs what


@pytest.mark.parametrize("kappa", [1, 2])
@pytest.mark.parametrize("place", [("transformer_blocks", 1), ("single_transformer_blocks", 2)])
def test_a_batch_equals_its_samples_one_by_one(kappa, place):
    """Samples that choose different blocks, in one batch; and the reference: the chosen blocks."""
    student, _ = grouped_pair(dtype=F64)
    set_kappa(student, kappa)
    group, inputs = getattr(student, place[0])[place[1]], streams(8)
    rotary = student.pos_embed(noise(24, 3) * 4)
    logits = group.router(**inputs)
    starts = logits.unfold(1, kappa, 1).mean(-1).argmax(1).tolist()
    assert len(set(starts)) > 1  # or the test shows nothing
    with torch.no_grad():
        text, image = group(**inputs, image_rotary_emb=rotary)
        for b, start in enumerate(starts):
            one = {name: value[b : b + 1] for name, value in inputs.items()}
            alone = group(**one, image_rotary_emb=rotary)
            blocks = list(group.blocks.values())[start : start + kappa]
            c, x = one["encoder_hidden_states"], one["hidden_states"]
            for block in blocks:
                c, x = block(x, c, one["temb"], rotary)
            for actual, single, expected in zip((text[b], image[b]), alone, (c, x)):
                assert relative(single[0], expected[0]) < 1e-12
                assert relative(actual, expected[0]) < 1e-12


@pytest.mark.parametrize("kappa", [1, 2])
def test_blocks_are_called_once_with_those_who_chose_them(kappa):
    student, _ = grouped_pair(blocks=Blocks(((1, 2, 3),), ((2, 3, 4),)))
    set_kappa(student, kappa)
    counts, inputs = calls_of(student), tiny_inputs(batch=8)
    with torch.no_grad():
        student(**inputs)
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        called = {index: sizes for (name, index), sizes in counts.items() if name == kind}
        assert all(len(sizes) <= 1 for sizes in called.values())
        assert sum(sum(sizes) for sizes in called.values()) == 8 * kappa  # nobody runs more
        assert sum(bool(sizes) for sizes in called.values()) > 1
    for sizes in counts.values():
        sizes.clear()
    with torch.no_grad():
        student(**sample(inputs, 0))
    assert sum(len(sizes) for sizes in counts.values()) == 2 * kappa  # 2 groups, nothing else runs


def test_whole_models_batch_equals_its_samples():
    student, _ = grouped_pair(dtype=F64)
    inputs = tiny_inputs(dtype=F64, batch=8)
    with torch.no_grad():
        whole = student(**inputs).sample
        for b in range(8):
            assert relative(student(**sample(inputs, b)).sample[0], whole[b]) < 1e-12


def test_kwargs_go_to_the_samples_they_belong_to():
    from d2m.model.block_group import _rows

    index = torch.tensor([0, 2])
    value = {"mask": torch.arange(3)[:, None], "states": [torch.arange(6).view(3, 2)], "scale": 0.5}
    part = _rows(value | {"other": torch.arange(5)}, index, 3)
    assert part["mask"].tolist() == [[0], [2]] and part["states"][0].tolist() == [[0, 1], [4, 5]]
    assert part["scale"] == 0.5 and part["other"].shape == (5,)
    assert _rows(None, index, 3) is None


# ---------------------------------------------------------------- the identity


@pytest.mark.parametrize(("dtype", "limit"), [(F64, 1e-12), (torch.float32, 1e-5)])
def test_all_blocks_and_experts_on_is_the_dense_model(dtype, limit):
    student, teacher = grouped_pair(dtype=dtype)
    inputs = tiny_inputs(dtype=dtype)
    assert identity_error(student, teacher, inputs) < limit
    assert [group.kappa for group in block_groups(student).values()] == [1, 1, 1]  # restored
    with torch.no_grad():
        assert relative(student(**inputs).sample, teacher(**inputs).sample) > 1e-3


def test_kappa_m_is_the_ungrouped_model_to_the_bit():
    student, _ = grouped_pair()
    plain, _ = grouped_pair(blocks=Blocks())
    set_kappa(student, None)
    with torch.no_grad():
        assert torch.equal(student(**tiny_inputs()).sample, plain(**tiny_inputs()).sample)
    assert [group.kappa for group in block_groups(student).values()] == [3, 2, 3]


def test_gradients_do_not_change_the_values():
    student, _ = grouped_pair()
    inputs = tiny_inputs(batch=8)
    with torch.no_grad():
        expected = student(**inputs).sample
    actual = student(**inputs).sample
    assert actual.requires_grad and relative(actual, expected) < 1e-6


# ---------------------------------------------------------------- gradients and records


def test_straight_through_by_hand():
    before = torch.tensor([[[1.0, 2.0]]])
    after = torch.tensor([[[4.0, 0.0]]], requires_grad=True)
    share = torch.tensor([0.3], requires_grad=True)
    result = straight_through(before, after, share)
    assert torch.equal(result, after)
    (result * torch.tensor([2.0, 5.0])).sum().backward()
    assert share.grad.tolist() == [2.0 * 3 + 5.0 * -2]  # grad . (after - before)
    assert after.grad.tolist() == [[[2.0, 5.0]]]


@pytest.mark.parametrize("kappa", [1, 2])
def test_routers_gradient_is_the_soft_mixtures(kappa):
    """At the values of the hard choice: d/d logits of sum_blocks share_i * (after_i - before_i)."""
    student, _ = grouped_pair(dtype=F64)
    group = student.transformer_blocks[1]
    group.kappa, group.record = kappa, True
    inputs = streams(5)
    rotary = student.pos_embed(noise(24, 3) * 4)
    text, image = group(**inputs, image_rotary_emb=rotary)
    weight_text, weight_image = noise(*text.shape, seed=8), noise(*image.shape, seed=9)
    logits = group.last_logits
    loss = (text * weight_text).sum() + (image * weight_image).sum()
    (actual,) = torch.autograd.grad(loss, logits)

    soft = logits.detach().requires_grad_(True)
    shares = soft.softmax(-1)
    total = torch.zeros((), dtype=F64)
    for b, start in enumerate(soft.argmax(-1).tolist()):
        c, x = (inputs[n][b : b + 1] for n in ("encoder_hidden_states", "hidden_states"))
        c, x = c.clone().requires_grad_(True), x.clone().requires_grad_(True)
        steps = []
        for block in list(group.blocks.values())[start : start + kappa]:
            before, (c, x) = (c, x), block(x, c, inputs["temb"][b : b + 1], rotary)
            steps.append((before, (c, x)))
        end = (c * weight_text[b]).sum() + (x * weight_image[b]).sum()
        pulls = [torch.autograd.grad(end, out, retain_graph=True) for _, out in steps]
        for i, ((before, after), pull) in enumerate(zip(steps, pulls)):
            offset = start + i
            windows = [w for w in range(4 - kappa) if w <= offset < w + kappa]
            gain = sum((p * (a - q)).sum() for p, a, q in zip(pull, after, before)).detach()
            total = total + shares[b, windows].sum() * gain
    (expected,) = torch.autograd.grad(total, soft)
    assert relative(actual, expected) < 1e-10


def test_records_only_when_asked_and_when_there_is_a_choice():
    student, _ = grouped_pair()
    first = next(iter(block_groups(student).values()))
    student(**tiny_inputs())
    assert first.last_logits is None
    first.record = True
    student(**tiny_inputs(batch=3))
    assert first.last_logits.shape == (3, 3) and first.last_logits.requires_grad
    set_kappa(student, None)
    student(**tiny_inputs())
    assert first.last_logits is None


def test_kappa_out_of_range():
    student, _ = grouped_pair()
    for kappa in (0, 3):
        with pytest.raises(ValueError, match=f"kappa={kappa} is out of range; .* take 1 to 2"):
            set_kappa(student, kappa)
    assert {group.kappa for group in block_groups(student).values()} == {1}


def test_structure():
    student, _ = grouped_pair()
    kinds = [type(block) for block in student.transformer_blocks]
    assert kinds[1] is BlockGroup and kinds[2:] == [SkippedBlock, SkippedBlock]
    assert list(block_groups(student)) == [
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.2",
    ]
    assert [group.indices for group in block_groups(student).values()] == [
        *BLOCKS.double,
        *BLOCKS.single,
    ]
    assert len(sparse_ffns(student)) == 2 * 4 + 5


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        student, _ = grouped_pair(dtype=F64)
        student.train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        student(**tiny_inputs(dtype=F64, batch=4)).sample.square().mean().backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("router" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)
