"""Score against cost: rows from a file, checked, and as a section of a page."""

import json

import pytest

from d2m.report.pareto import chart, dots_of, known_rows, pareto

RATE = {"score": 0.8, "low": 0.77, "high": 0.83, "n": 600}


def row(name="L", **changes):
    answer = {"name": name, "kind": "sparse", "of": None, "score": RATE}
    return answer | {"flops_vs_dense": 0.667, "activated_params": 4_000_000} | changes


def write(path, rows):
    path.write_text(json.dumps({"format": 1, "rows": rows}))
    return path


def test_rows_of_a_file_without_those_not_run(tmp_path) -> None:
    rows = [row(), {"name": "S", "kind": "sparse", "score": None}, row("L k=1", of="L")]
    found = known_rows(write(tmp_path / "summary.json", rows))
    assert found == [row(), row("L k=1", of="L")]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "best"}, r"rows\[0\]: kind is 'best'; expected one of this, dense"),
        ({"flops_vs_dense": -1}, "flops_vs_dense is -1; expected a number from 0 up"),
        ({"activated_params": "4 M"}, "activated_params is '4 M'; expected a number"),
        ({"score": {"score": 2}}, "score.score is 2; expected 0 to 1"),
        ({"name": None}, "name is None; expected a string"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, change, words) -> None:
    with pytest.raises(ValueError, match=words):
        known_rows(write(tmp_path / "summary.json", [row(**change)]))


def test_files_that_are_no_summaries(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="give the summary.json that scripts.reproduce"):
        known_rows(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        known_rows(tmp_path / "a.json")
    for text, words in (
        ("[]", r"holds \[\], expected a JSON object"),
        ("{}", "rows is None; expected a list"),
    ):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            known_rows(tmp_path / "b.json")


def test_dots_of_judged_rows() -> None:
    [dot] = dots_of([row(), row("S", score=None)], "activated_params")
    assert (dot.name, dot.x, dot.y, dot.low, dot.high) == ("L", 4_000_000, 0.8, 0.77, 0.83)


def test_the_section() -> None:
    rows = [row(), row("dense", kind="dense", flops_vs_dense=1.0, score=RATE | {"n": 120})]
    part = pareto({"pareto": rows})
    assert part is not None and "of 120 to 600 a row" in part.note
    for words in ("Score against FLOPs", "activated parameters", "dense", "L", "score"):
        assert f">{words}<" in part.charts[0].svgs[0]
    assert pareto({"pareto": [row(score=None)]}) is None and pareto({}) is None
    assert chart([]) is None


def test_the_models_own_rows_and_others_of_the_same_name(tiny_sparse_dir) -> None:
    from d2m.plan.count import plan
    from d2m.report.pareto import merge_rows, own_rows

    planned = plan(tiny_sparse_dir)
    scores = {"dense": {"overall": RATE}, "sparse": {"overall": RATE | {"score": 0.7}}}
    own = own_rows(tiny_sparse_dir, "L", scores)
    assert [(each["name"], each["kind"]) for each in own] == [("dense", "dense"), ("L", "this")]
    assert own[1]["flops_vs_dense"] == planned["flops_vs_dense"] < 1 == own[0]["flops_vs_dense"]
    assert own[1]["activated_params"] == planned["activated_params"] < own[0]["activated_params"]
    assert own_rows(tiny_sparse_dir, "L", {}) == []
    both = merge_rows(own, [row("L"), row("L k=1", of="L"), row("S")])
    names = ["dense", "L", "L (compared)", "L k=1", "S"]
    assert [each["name"] for each in both] == names
    assert [each["of"] for each in both] == [None, None, None, "L (compared)", None]
