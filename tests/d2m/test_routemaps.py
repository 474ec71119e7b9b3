"""The report's maps: experts by image position, blocks by noise level and prompt, dead experts."""

import re

from d2m.routemaps import block_choices, dead, positions, words_of

RUN = {"load": [0.5, 0.5, 0.0], "tokens": 90, "dead_experts": [2]}
FINE = {"load": [0.4, 0.3, 0.3], "tokens": 90, "dead_experts": []}
SKIPPED = {"load": [0.0] * 3, "tokens": 0, "dead_experts": [0, 1, 2]}


def report(**routing):
    return {"routing": {"top_k": 1, "edges": [0.0, 0.5, 1.0]} | routing}


def test_names_of_layers() -> None:
    assert words_of("transformer_blocks.3.ff") == "double 3 image"
    assert words_of("transformer_blocks.3.ff_context") == "double 3 text"
    assert words_of("single_transformer_blocks.11.proj_mlp") == "single 11"


def test_positions_show_the_layers_where_they_tell_most() -> None:
    share = [[0.8, 0.2], [0.2, 0.8], [0.0, 0.0]]
    layers = {
        f"single_transformer_blocks.{i}.proj_mlp": {"share": share, "information": i / 100}
        for i in range(9)
    }
    layers["transformer_blocks.0.ff"] = {"share": share, "information": 0.5}
    page = positions(report(positions={"rows": 1, "columns": 2, "layers": layers}))
    assert page is not None
    assert "at most 50.0 % of which expert is chosen (double 0 image)" in page
    drawn = re.findall(r">(double 0 image|single \d+), expert 0, row 0, column 0", page)
    assert drawn == ["double 0 image"] + [f"single {i}" for i in (8, 7, 6, 5, 4)]
    assert "expert 0, row 0, column 0: 80.0 % of the choices, 1.60 x its mean" in page
    assert "expert 2, row" not in page  # never chosen: nowhere to show
    assert "single blocks, 8: 8.0 % of the choice told by the position" in page


def test_blocks_by_noise_level_and_prompt() -> None:
    def shares(*share, samples=10):
        return {"samples": samples, "share": list(share)}

    group = {
        "blocks": [3, 4, 5],
        "kappa": 1,
        "all": shares(0.5, 0.5, 0.0),
        "buckets": [shares(1.0, 0.0, 0.0), shares(0.0, 1.0, 0.0)],
        "categories": {"counting": shares(0.2, 0.8, 0.0, samples=7)},
    }
    fixed = group | {"all": shares(0.0, 0.0, 1.0), "blocks": [6, 7, 8]}
    groups = {"transformer_blocks.3": group, "single_transformer_blocks.6": fixed}
    page = block_choices(report(groups=groups))
    assert page is not None
    assert "double 3 – 5, 1 of 3 run, 4, &lt; 1: 100.0 % of the samples" in page
    assert "double 3 – 5, 1 of 3 run, 4, counting (7): 80.0 % of the samples" in page
    assert "1 of 2 groups run the same blocks for nearly every sample" in page
    assert "single 6 – 8" in page


def test_dead_experts_are_listed() -> None:
    layers = {
        "transformer_blocks.0.ff": {"all": RUN, "buckets": [RUN, FINE]},
        "transformer_blocks.1.ff": {"all": FINE, "buckets": [FINE, RUN]},
        "transformer_blocks.2.ff": {"all": SKIPPED, "buckets": [SKIPPED] * 2},
        "transformer_blocks.3.ff": {"all": FINE, "buckets": [FINE, SKIPPED]},
    }
    page = dead(report(layers=layers))
    assert page is not None
    rows = re.findall(r'<th scope="row">(.*?)</th><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>', page)
    assert rows == [
        ("double 0 image", "2", ""),
        ("double 1 image", "", "t 0.5 – 1: 2"),
        ("double 2 image", "no token came here: its group ran other blocks", ""),
    ]
    assert "1 of 9 experts in layers that ran are dead" in page


def test_what_a_report_does_not_hold_is_left_out() -> None:
    older = {"layers": {"transformer_blocks.0.ff": {"all": {"load": [1.0]}, "buckets": []}}}
    for section in (positions, block_choices, dead):
        assert section({"routing": None}) is None
        assert section(report(**older)) is None
