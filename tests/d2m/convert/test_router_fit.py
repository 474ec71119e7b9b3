"""Routers that choose from the first step on: centred, scaled, and sending samples apart."""

import torch

from d2m.convert.router_fit import SPREAD, spread, spread_routers
from d2m.families.flow import generator_at, noisy
from d2m.families.inputs import transformer_inputs
from d2m.model.block_group import block_groups, set_kappa
from tests.tiny.pair import THREE, grouped_pair, tiny_batches


def test_logits_are_centred_and_spread():
    student, _ = grouped_pair(blocks=THREE.blocks)
    (group, *_) = block_groups(student).values()
    dim = group.router.embedding.in_features
    generator = torch.Generator().manual_seed(0)
    tokens = 5 + torch.randn(400, 2 * dim, generator=generator)  # mostly their own mean
    embeddings = -3 + torch.randn(400, dim, generator=generator)

    def chosen():
        logits = group.router(tokens[:, None, :dim], tokens[:, None, dim:], embeddings)
        return logits, torch.bincount(logits.argmax(-1), minlength=len(group.blocks))

    with torch.no_grad():
        for linear in (group.router.tokens, group.router.embedding):  # one row follows the mean
            linear.weight[0] += 0.05
        assert chosen()[1].max() > 360
        for part, weight in spread(group, tokens.double(), embeddings.double()).items():
            group.router.get_parameter(part).copy_(weight)
        logits, counts = chosen()
    assert logits.mean(0).abs().max() < 0.01 and abs(logits.std(0).mean() - SPREAD) < 0.01
    assert counts.min() > 60


def test_a_students_routers_take_all_of_their_blocks():
    student, teacher = grouped_pair(blocks=THREE.blocks)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = spread_routers(student, tiny_batches, THREE, seed=3)
    again = spread_routers(student, tiny_batches, THREE, seed=3)
    names = [
        f"{n}.router.{p}.weight" for n in block_groups(student) for p in ("tokens", "embedding")
    ]
    assert sorted(found) == sorted(names)
    for name, weight in found.items():
        assert torch.equal(weight, again[name]) and weight.dtype == torch.float32
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # only run
    for name, weight in found.items():
        student.get_parameter(name).data.copy_(weight)
    set_kappa(student, 1)
    rows = []
    with torch.no_grad():
        for group in block_groups(student).values():
            group.record = True
        for step in range(8):
            batch = tiny_batches(100 + step, 8)
            x, t, _ = noisy(batch["latents"], generator_at(9, step))
            student(**transformer_inputs(student, batch, x, t))
            rows.append([g.last_logits.argmax(-1) for g in block_groups(student).values()])
    for choices in zip(*rows):
        assert torch.cat(choices).unique().numel() > 1
