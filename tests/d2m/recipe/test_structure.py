"""Groups of blocks and modulation as data: round trips, and mistakes in one sentence."""

import dataclasses

import pytest

from d2m.recipe.structure import (
    AdaLN,
    Blocks,
    active_blocks,
    adaln_from,
    blocks_from,
    check_depth,
    lowrank_default,
)

DEPTH = {"double": 19, "single": 38}


def test_nothing_said_is_nothing_done():
    assert blocks_from({}) == Blocks() and not Blocks().grouped
    assert adaln_from({}) == AdaLN("full", None)
    assert active_blocks(Blocks(), DEPTH) == DEPTH


def test_round_trip():
    blocks = blocks_from(
        {
            "groups": {"single": [[7, 8], [2, 3, 4]]},
            "kappa": 2,
            "alpha": 0,
            "drop": {"double": [5, 1]},
        }
    )
    assert blocks.single == ((2, 3, 4), (7, 8)) and blocks.drop_double == (1, 5)
    assert blocks_from(blocks.to_dict()) == blocks and blocks.alpha == 0.0
    assert "drop" not in Blocks().to_dict()
    assert adaln_from(dataclasses.asdict(AdaLN("lowrank", 7))) == AdaLN("lowrank", 7)


def test_active_blocks_of_the_papers_presets():
    def threes(count):
        return tuple((3 * i, 3 * i + 1, 3 * i + 2) for i in range(count))

    for double, single, active in ((2, 5, (15, 28)), (4, 7, (11, 24)), (4, 11, (11, 16))):
        blocks = Blocks(threes(double), threes(single))
        assert tuple(active_blocks(blocks, DEPTH).values()) == active
    assert active_blocks(Blocks(threes(1), kappa=3), DEPTH) == DEPTH
    assert active_blocks(Blocks(drop_double=(0, 7)), DEPTH) == {"double": 17, "single": 38}


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        ([], "blocks is \\[\\]; expected an object"),
        (
            {"groups": {"triple": []}},
            "blocks.groups has the unknown key 'triple'; known are double",
        ),
        ({"groups": {"double": [3]}}, "groups.double is 3; expected consecutive block indices"),
        ({"groups": {"double": [[3, 5]]}}, "is \\[3, 5\\]; expected consecutive"),
        ({"groups": {"double": [[3]]}}, "is \\[3\\]; expected consecutive"),
        ({"groups": {"double": [[-1, 0]]}}, "expected consecutive"),
        (
            {"groups": {"single": [[1, 2], [2, 3]]}},
            "single block is \\[2\\]; expected every block in",
        ),
        ({"groups": {"single": [[1, 2]]}, "drop": {"single": [2]}}, "expected every block in one"),
        ({"groups": {"single": [[1, 2]]}, "kappa": 3}, "expected at least kappa = 3 blocks"),
        ({"kappa": 0}, "blocks.kappa is 0; expected a whole number from 1"),
        ({"alpha": 2}, "blocks.alpha is 2; expected a number from 0 to 1"),
        ({"drop": {"double": 3}}, "blocks.drop.double is 3; expected a list of block indices"),
    ],
)
def test_mistakes_in_blocks(obj, words):
    with pytest.raises(ValueError, match=words):
        blocks_from(obj)


@pytest.mark.parametrize("obj", [{"mode": "single", "rank": 3}, {"mode": "lowrank", "rank": 0}])
def test_mistakes_in_modulation(obj):
    with pytest.raises(ValueError, match="adaln.rank is .*; expected null, or a whole number"):
        adaln_from(obj)


def test_depth_is_checked():
    check_depth(Blocks(((17, 18),), ((36, 37),)), DEPTH)
    with pytest.raises(ValueError, match="name single block 38; expected 0 to 37"):
        check_depth(Blocks(single=((37, 38),)), DEPTH)
    with pytest.raises(ValueError, match="name double block 19; expected 0 to 18"):
        check_depth(Blocks(drop_double=(19,)), DEPTH)


def test_default_rank_has_no_more_weights_than_single():
    for dim, chunks in ((3072, 19 * 12 + 38 * 3), (128, 72), (32, 30)):
        rank = lowrank_default(dim, chunks)
        single = 6 * dim * dim + 6 * dim + chunks * dim
        weights = dim * rank + chunks * dim * rank + chunks * dim
        assert weights <= single < weights + dim + chunks * dim
    assert lowrank_default(3072, 342) == 53 and lowrank_default(128, 72) == 10
