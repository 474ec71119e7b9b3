"""Groups in the block lists: names there and back, values moved and not changed."""

import pytest
import torch

from d2m.families import FLUX
from d2m.model.block_group import SkippedBlock, block_groups
from d2m.model.grouping import dense_name, group_blocks, grouped_state_dict, router_weights
from d2m.recipe.structure import Blocks
from tests.tiny.pair import BLOCKS, DEPTH, RECIPE, grouped_pair, tiny_pair
from tests.tiny.pipeline import tiny_inputs, tiny_transformer


def test_names_of_the_state_dict():
    student, _ = grouped_pair()
    names = student.state_dict().keys()
    assert {
        "transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.1.blocks.1.attn.to_q.weight",
        "transformer_blocks.1.blocks.3.ff.experts.w1",
        "transformer_blocks.1.router.tokens.weight",
        "transformer_blocks.1.router.embedding.weight",
        "single_transformer_blocks.2.blocks.4.proj_mlp.gate.weight",
    } <= set(names)
    assert not any(
        name.startswith(("transformer_blocks.2.", "transformer_blocks.3.")) for name in names
    )
    plain = set(tiny_pair(0, **DEPTH)[0].state_dict())
    assert {dense_name(name) for name in names if ".router." not in name} == plain


def test_dense_names():
    assert dense_name("transformer_blocks.3.blocks.14.ff.gate") == "transformer_blocks.14.ff.gate"
    assert dense_name("single_transformer_blocks.3.norm") == "single_transformer_blocks.3.norm"
    assert dense_name("transformer_blocks.1.blocks.2") == "transformer_blocks.2"


def test_values_are_moved_uncopied():
    student, _ = tiny_pair(0, **DEPTH)
    state = student.state_dict()
    moved = grouped_state_dict(state, BLOCKS, FLUX, seed=4)
    for name, tensor in moved.items():
        if ".router." in name:
            group, part = name.split(".router.")
            expected = router_weights(group, tensor.shape[0], 32, 4)[part]
            assert torch.equal(tensor, expected) and tensor.dtype == torch.float32
        else:
            assert tensor is state[dense_name(name)]
    assert moved.keys() == grouped_pair()[0].state_dict().keys()


def test_routers_depend_on_seed_and_name_alone():
    first = router_weights("transformer_blocks.1", 3, 32, 0)
    assert {part: tuple(w.shape) for part, w in first.items()} == {
        "tokens.weight": (3, 64),
        "embedding.weight": (3, 32),
    }
    for name, seed in (("transformer_blocks.2", 0), ("transformer_blocks.1", 1)):
        other = router_weights(name, 3, 32, seed)
        assert not torch.equal(first["tokens.weight"], other["tokens.weight"])


def test_dense_blocks_can_be_grouped_too():
    """MoB without MoE: the dense model itself, all blocks on, is unchanged to the bit."""
    dense, grouped = tiny_transformer(0, **DEPTH), tiny_transformer(0, **DEPTH)
    group_blocks(grouped, Blocks(BLOCKS.double, BLOCKS.single, kappa=2))
    for group in block_groups(grouped).values():
        group.kappa = len(group.blocks)
    with torch.no_grad():
        assert torch.equal(grouped(**tiny_inputs()).sample, dense(**tiny_inputs()).sample)


def test_dropped_blocks_are_gone():
    """Depth pruning: equal to a dense model that never had the blocks."""
    blocks = Blocks(drop_double=(1, 2), drop_single=(4,))
    student, teacher = grouped_pair(blocks=blocks)
    assert type(student.transformer_blocks[1]) is SkippedBlock
    assert not any(name.startswith("transformer_blocks.1.") for name in student.state_dict())
    for kind, indices in (("transformer_blocks", (2, 1)), ("single_transformer_blocks", (4,))):
        for index in indices:
            del getattr(teacher, kind)[index]
    from d2m.model.surgery import identity_error

    assert identity_error(student, teacher, tiny_inputs()) < 1e-5


def test_indices_the_model_does_not_have():
    with pytest.raises(ValueError, match="name double block 4; expected 0 to 3"):
        grouped_pair(blocks=Blocks(double=((3, 4),)))
    assert RECIPE.blocks == Blocks()
