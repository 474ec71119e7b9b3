"""Blocks that groups run: windows by hand, and the tally by noise level and kind of prompt."""

import torch

from calib.measure.blocks_run import Tally, blocks_run, tallies
from d2m.model.block_group import block_groups
from tests.tiny.pair import grouped_pair


def test_windows_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert blocks_run(logits, 1).int().tolist() == [[0, 1, 0], [1, 0, 0]]
    assert blocks_run(logits, 2).int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_the_tally_is_apart_by_bucket_and_category() -> None:
    group = block_groups(grouped_pair()[0])["transformer_blocks.1"]
    tally = Tally(group, 2, ("few", "many", "none"))
    first = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [9.0, 0, 0]])
    tally.add(first, 0, torch.tensor([0, 1, 1]))
    tally.add(torch.tensor([[0.0, 0, 9.0]]), 1, torch.tensor([1]))
    assert tally.figures() == {
        "blocks": [1, 2, 3],
        "kappa": 1,
        "all": {"samples": 4, "share": [0.5, 0.25, 0.25]},
        "buckets": [
            {"samples": 3, "share": [0.6667, 0.3333, 0.0]},
            {"samples": 1, "share": [0.0, 0.0, 1.0]},
        ],
        "categories": {
            "few": {"samples": 1, "share": [1.0, 0.0, 0.0]},
            "many": {"samples": 3, "share": [0.3333, 0.3333, 0.3333]},
            "none": {"samples": 0, "share": [0.0, 0.0, 0.0]},
        },
    }


def test_groups_that_run_all_of_their_blocks_choose_nothing() -> None:
    groups = block_groups(grouped_pair()[0])
    assert len(tallies(groups, 1, ())) == len(groups) == 3
    for group in groups.values():
        group.kappa = len(group.blocks)
    assert tallies(groups, 1, ()) == {}
