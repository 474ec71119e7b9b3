"""The report's maps: experts by image position, blocks by noise level and prompt, dead experts."""

import re

from d2m.report.routing import block_choices, dead, layer_title, positions

RUN = {"load": [0.5, 0.5, 0.0], "tokens": 90, "dead_experts": [2]}
FINE = {"load": [0.4, 0.3, 0.3], "tokens": 90, "dead_experts": []}
SKIPPED = {"load": [0.0] * 3, "tokens": 0, "dead_experts": [0, 1, 2]}


def report(**routing):
    return {"routing": {"top_k": 1, "edges": [0.0, 0.5, 1.0]} | routing}


def colours(chart):
    """Of the cells, in rows."""
    return re.findall(r"fill: var\(--([ds]\d+)\)", chart)


def texts(chart):
    return re.findall(r"<text [^>]*>([^<]*)<", chart)


def test_names_of_layers() -> None:
    assert layer_title("transformer_blocks.3.ff") == "double 3 image"
    assert layer_title("transformer_blocks.3.ff_context") == "double 3 text"
    assert layer_title("single_transformer_blocks.11.proj_mlp") == "single 11"


def test_positions_show_the_layers_where_they_tell_most() -> None:
    share = [[0.8, 0.2], [0.2, 0.8], [0.0, 0.0]]
    layers = {
        f"single_transformer_blocks.{i}.proj_mlp": {"share": share, "information": i / 100}
        for i in range(9)
    }
    layers["transformer_blocks.0.ff"] = {"share": share, "information": 0.5}
    part = positions(report(positions={"rows": 1, "columns": 2, "layers": layers}))
    assert part is not None
    assert "at most 50.0 % about which expert is chosen (double 0 image)" in part.note
    tells, maps = part.charts
    assert colours(tells.svgs[0]) == ["s8"]  # 0.5 is the most
    assert colours(tells.svgs[1]) == ["s0"] * 4 + ["s1"] * 5  # 0 to 8 hundredths, block by block
    drawn = re.findall(r">((?:double|single) [^<]*): ([\d.]+ %)<", maps.svgs[0])
    singles = [(f"single {i}", f"{i}.0 %") for i in (8, 7, 6, 5, 4)]
    assert drawn == [("double 0 image", "50.0 %"), *singles]
    # Two places of two experts a layer: 1.6 and 0.4 times the mean; the third is never chosen.
    assert colours(maps.svgs[0]) == ["d7", "d2", "d2", "d7"] * 6


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
    part = block_choices(report(groups=groups))
    assert part is not None
    assert "1 of 2 groups run the same blocks for nearly every sample" in part.note
    times, prompts = (chart.svgs[0] for chart in part.charts)
    words = texts(times)
    assert {"double 3 – 5, 1 of 3 run", "single 6 – 8, 1 of 3 run", "all", "&lt; 1"} <= set(words)
    rows = ["s4", "s8", "s0"], ["s4", "s0", "s8"], ["s0", "s0", "s0"]  # of 0.5, 1, 0 ...
    assert colours(times)[:9] == [each for row in rows for each in row]
    assert "counting (7)" in texts(prompts) and colours(prompts)[:3] == ["s2", "s6", "s0"]


def test_dead_experts_are_listed() -> None:
    layers = {
        "transformer_blocks.0.ff": {"all": RUN, "buckets": [RUN, FINE]},
        "transformer_blocks.1.ff": {"all": FINE, "buckets": [FINE, RUN]},
        "transformer_blocks.2.ff": {"all": SKIPPED, "buckets": [SKIPPED] * 2},
        "transformer_blocks.3.ff": {"all": FINE, "buckets": [FINE, SKIPPED]},
    }
    part = dead(report(layers=layers))
    assert part is not None and part.table is not None
    assert part.table.rows == [
        ["double 0 image", "2", ""],
        ["double 1 image", "", "t 0.5 – 1: 2"],
        ["double 2 image", "no token came here: its group ran other blocks", ""],
    ]
    assert "1 of 9 experts in layers that ran are dead" in part.note


def test_what_a_report_does_not_hold_is_left_out() -> None:
    older = {"layers": {"transformer_blocks.0.ff": {"all": {"load": [1.0]}, "buckets": []}}}
    for section in (positions, block_choices, dead):
        assert section({"routing": None}) is None
        assert section(report(**older)) is None
