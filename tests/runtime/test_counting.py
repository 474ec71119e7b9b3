"""Counts from names and shapes: experts a token does not use, blocks that a group skips."""

import pytest

from runtime.counting import block_count, parameters
from runtime.files.tensors import Tensor


def tensor(*shape: int) -> Tensor:
    return Tensor("F32", shape, 0, 0)


GROUPED = {
    "embed.weight": tensor(5),
    "transformer_blocks.0.w": tensor(7),
    "transformer_blocks.1.router.tokens.weight": tensor(3, 8),
    **{f"transformer_blocks.1.blocks.{i}.w": tensor(7) for i in range(3)},
    **{f"transformer_blocks.1.blocks.{i}.ff.experts.w1": tensor(12, 2, 2) for i in range(3)},
    "transformer_blocks.1.blocks.0.neurons": tensor(100),
}


@pytest.mark.parametrize(("kappa", "run"), [(None, 3), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_blocks_that_a_group_skips_are_not_activated(kappa: int | None, run: int) -> None:
    counted = parameters(GROUPED, top_k=2, kappa=kappa)
    assert counted["total"] == 5 + 7 + 24 + 3 * (7 + 48)
    assert counted["activated"] == 5 + 7 + 24 + run * (7 + 8)


def test_without_experts_everything_is_activated() -> None:
    counted = parameters({"a": tensor(2, 3), "b": tensor()})
    assert counted == {"total": 7, "activated": 7}


def test_blocks_of_a_group_count_each_for_itself() -> None:
    assert block_count(GROUPED, "transformer_blocks") == 4
    assert block_count(GROUPED, "single_transformer_blocks") == 0
