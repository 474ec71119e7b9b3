"""The tables of scripts.reproduce, from made-up results: what is pooled, compared,
written."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COST = {"total_params": 9_000_000, "activated_params": 4_000_000, "flops": 10, "blocks": {}}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def settings(tmp_path: Path):
    from scripts.reproduce.work import Settings

    results = tmp_path / "results"
    results.mkdir()
    return Settings(str(ROOT / "models/shapes-dense"), tmp_path / "work", results, 600, 100)


def put(settings, name: str, *right: int, n: int = 100, share: float = 0.667, **changes) -> None:
    """A result file per seed, `right` of n pictures judged right."""
    from calib.score.rates import wilson
    from scripts.reproduce.rows import named
    from scripts.reproduce.work import identity, result_file

    for seed, good in enumerate(right):
        low, high = wilson(good, n)
        rate = {"score": round(good / n, 4), "low": low, "high": high, "n": n}
        answer = {
            "row": name,
            "seed": seed,
            "identity": identity(named(name), seed, settings),
            "score": {"overall": rate, "categories": {"counting": rate}},
            "cost": COST | {"flops_vs_dense": share},
            "seconds": {"conversion": 60, "all": 70},
            "date": f"2026-11-{20 + seed}",
            "machine": {"device": "cpu", "cpus": 2, "torch": "2.13.0"},
        }
        path = result_file(named(name), seed, settings)
        path.write_text(json.dumps(answer | changes))


def gathered(settings):
    from scripts.reproduce.summary import gather, summary

    return summary(*gather(settings))


def rows(answer):
    return {row["name"]: row for row in answer["rows"]}


def checks(answer):
    return {check["expected"]: check for check in answer["checks"]}


# ---------------------------------------------------------------- arithmetic


def test_seeds_are_pooled(settings) -> None:
    from calib.score.rates import wilson

    put(settings, "dense", 80, 90)
    put(settings, "L", 78, 84, 99)
    answer = rows(gathered(settings))
    low, high = wilson(78 + 84 + 99, 300)
    pooled = {"score": 0.87, "low": round(low, 4), "high": round(high, 4), "n": 300}
    assert answer["L"]["score"] == pooled
    assert answer["L"]["seeds"] == [0, 1, 2] and answer["L"]["per_seed"]["2"] == 0.99
    # The dense model lacks seed 2: its share is over the other two.
    share = answer["L"]["of_dense"]
    assert share["value"] == pytest.approx(162 / 170, abs=1e-4) and share["seeds"] == [0, 1]
    assert share["low"] < share["value"] < share["high"]
    assert answer["dense"]["of_dense"] is None and answer["dense"]["steps"] == 0
    assert answer["L"]["flops_vs_dense"] == 0.667 and answer["L"]["steps"] == 600
    assert answer["S"] == {
        "name": "S",
        "says": answer["S"]["says"],
        "kind": "sparse",
        "of": None,
        "seeds": [],
        "score": None,
    }
    assert answer["L"]["categories"]["counting"]["n"] == 300


def test_ratio_and_difference_by_hand() -> None:
    from scripts.reproduce.summary import difference, rate_of, ratio

    a, b = rate_of(56, 70), rate_of(48, 80)
    # Newcombe's own example: 56/70 - 48/80 = .2 (.0524 to .3339).
    found = difference(a, b)
    assert found == {
        "value": 0.2,
        "low": pytest.approx(0.0524, abs=2e-4),
        "high": pytest.approx(0.3339, abs=2e-4),
    }
    # ln 4/3 +- 1.96 sqrt(14/70/56 + 32/80/48) = .2877 +- .2139
    found = ratio(a, b)
    assert found["value"] == pytest.approx(4 / 3, abs=1e-4)
    assert found["low"] == pytest.approx(1.0766, abs=2e-4)
    assert found["high"] == pytest.approx(1.6513, abs=2e-4)
    assert ratio(rate_of(0, 9), a) == {"value": 0.0, "low": None, "high": None}
    assert ratio(a, rate_of(0, 9))["value"] is None


def test_expectations(settings) -> None:
    put(settings, "dense", 85, 85, 85)
    put(settings, "L", 82, 82, 82)  # .965 of dense
    put(settings, "S", 73, 70, 72)  # .843
    put(settings, "width-1.5", 60, 61, 62)  # far below L
    put(settings, "width-2", 85, 85, 85)  # above L, intervals meet
    put(settings, "depth-first", 68, 69, 70)  # below S, intervals meet
    put(settings, "depth-middle", 40, 40, 40)
    put(settings, "random", 99, 99, 99)  # above L
    found = checks(gathered(settings))
    states = {name: check["state"] for name, check in found.items()}
    assert states == {
        "L keeps 95 % of dense": "met",
        "S keeps 85 % of dense": "not met",
        "XS keeps 75 % of dense": "not yet measured",
        "L clearly over width-1.5": "met",
        "L not worse than width-2": "met",
        "S clearly over depth-first": "not met",
        "S clearly over depth-middle": "met",
        "L over random": "not met",
        "S over joint": "not yet measured",
        "budget over S": "not yet measured",
        "XS clearly over XS-first": "not yet measured",
        "joint clearly over depth-first-joint": "not yet measured",
        "L-quarter clearly over width-0.375": "not yet measured",
        "L-quarter-joint clearly over width-0.375": "not yet measured",
        **{name: "not yet measured" for name in states if "-long" in name},
    }
    assert sum("-long" in name for name in states) == 7
    assert found["L keeps 95 % of dense"]["figure"]["value"] == pytest.approx(82 / 85, abs=1e-4)
    assert not found["L keeps 95 % of dense"]["certain"]
    assert found["L clearly over width-1.5"]["certain"] and found["L over random"]["certain"]
    assert not found["S clearly over depth-first"]["certain"]
    difference = found["L not worse than width-2"]["figure"]
    assert difference["value"] == pytest.approx(-0.03) and difference["high"] > 0
    assert found["S over joint"]["figure"] is None and found["S over joint"]["seeds"] == []


def test_longer_rows_are_the_others_recipes_with_more_steps() -> None:
    """Longer stages and nothing else; a stage 3 from the model that trained longer too."""
    from d2m.recipe import recipe as recipes
    from scripts.reproduce.rows import ROWS, named, recipe_of

    dense = str(ROOT / "models" / "shapes-dense")
    steps = {}
    for row in ROWS:
        if row.recipe:
            made = recipes.to_dict(recipe_of(row, dense, 600, 0))
            steps[row.name] = [stage.pop("steps") for stage in made["stages"] if not stage["skip"]]
            if row.times != 1 and row.name != "XS-joint-long":
                base = recipes.to_dict(recipe_of(named(row.name[: -len("-long")]), dense, 600, 0))
                for stage in base["stages"]:
                    stage.pop("steps")
                for stage in made["stages"]:
                    stage.pop("steps", None)
                assert made == base, row.name
    assert steps["L-long"] == [1000, 500] and steps["width-1.5-long"] == [1500]
    assert steps["joint"] == [1200] and steps["XS-joint-long"] == [4100]
    joint, blocks = (recipe_of(named(f"XS-{way}"), dense, 600, 0) for way in ("joint-long", "long"))
    assert joint.blocks == blocks.blocks and "router" in joint.stages[0].train
    assert steps["S-long"] == steps["depth-first-long"] == steps["XS-long"] == [2600]


def test_worse_is_worse_and_level_is_not_over(settings) -> None:
    put(settings, "L", 60, 60)
    put(settings, "width-2", 80, 80)
    put(settings, "random", 60, 60)
    put(settings, "width-1.5", 60, 60)
    states = {name: check["state"] for name, check in checks(gathered(settings)).items()}
    assert states["L not worse than width-2"] == "not met"
    assert states["L over random"] == states["L clearly over width-1.5"] == "not met"


def test_comparisons_take_the_seeds_of_both(settings) -> None:
    put(settings, "dense", 50)
    put(settings, "L", 50, 0, 0)
    found = checks(gathered(settings))["L keeps 95 % of dense"]
    assert (found["state"], found["seeds"]) == ("met", [0])


def test_results_of_other_settings_are_left_out_and_named(settings) -> None:
    put(settings, "L", 80, 81)
    put(settings, "S", 80, identity={"recipes": [], "knobs": {}, "n": 100})
    unknown = {"recipes": [{"name": "x", "from the future": 1}], "knobs": {}, "n": 100}
    put(settings, "XS", 80, identity=unknown)
    answer = gathered(settings)
    assert answer["left_out"] == ["S-seed0.json", "XS-seed0.json"]
    assert rows(answer)["S"]["score"] is None and rows(answer)["L"]["seeds"] == [0, 1]


def test_what_a_recipe_did_not_know_yet_had_its_default(settings) -> None:
    from scripts.reproduce.rows import named
    from scripts.reproduce.work import finished, identity, result_file

    put(settings, "L", 80)
    older = identity(named("L"), 0, settings)
    assert older["recipes"][0].pop("t_mean") == 1.2
    path = result_file(named("L"), 0, settings)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": older}))
    assert finished(named("L"), 0, settings)
    older["recipes"][0]["t_mean"] = 1.3
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": older}))
    assert finished(named("L"), 0, settings) is None


# ---------------------------------------------------------------- what is written


def written(settings, document: Path | None = None) -> dict[str, str]:
    from scripts.reproduce import __main__ as reproduce

    reproduce.write(settings, document)
    return {path.name: path.read_text("utf-8") for path in settings.results.iterdir()}


def test_everything_is_written_and_the_same_twice(settings) -> None:
    put(settings, "dense", 85, 84, share=1.0)
    put(settings, "L", 82, 83)
    put(settings, "L k=1", 75, share=0.63)
    first = written(settings)
    assert first == written(settings)
    table = first["table.md"]
    assert "| dense | the teacher | 0, 1 | .845 (" in table
    assert re.search(r"\| L \| .* \| 0, 1 \| \.825 \(.*\) \| \.976 \| 4 M \| \.667 \|", table)
    assert table.count("not run yet") == len(json.loads(first["summary.json"])["rows"]) - 3
    assert "| L keeps 95 % of dense | met | L .825 against dense .845; ratio .9763 (" in table
    assert "2026-11-20 to 2026-11-21" in table and "100 images a row and seed" in table
    page = first["report.html"]
    for words in ("L k=1", "counting", "not yet measured", "Score against FLOPs", "seed 1"):
        assert words in page, words
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")


def test_the_drawing_stands_alone(settings) -> None:
    import xml.etree.ElementTree as tree

    put(settings, "dense", 85, share=1.0)
    put(settings, "L", 82)
    put(settings, "L k=1", 75, share=0.63)
    drawing = written(settings)["pareto.svg"]
    root = tree.fromstring(drawing)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in drawing and "url(" not in drawing.replace("url(#", "")
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("dense") == 3 and texts.count("L k=1") == 2  # a dot a chart; the legend
    assert {"Score against FLOPs", "Score against activated parameters"} <= set(texts)


def test_without_results_nothing_is_drawn_and_nothing_made_up(settings) -> None:
    (settings.results / "pareto.svg").write_text("of earlier results")
    files = written(settings)
    assert "pareto.svg" not in files
    assert "No row has been run yet." in files["table.md"]
    assert not re.search(r"\.\d\d", re.sub(r"width-\d\.\d+", "", files["table.md"]))


def test_the_document_changes_between_its_comments_only(settings, tmp_path: Path) -> None:
    from scripts.reproduce.tables import BEGIN, END

    document = tmp_path / "results.md"
    document.write_text("no place for it")
    put(settings, "L", 82)
    with pytest.raises(ValueError, match="put both where the table goes"):
        written(settings, document)
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        written(settings, document)
        text = document.read_text()
        assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
        assert "old" not in text and text.count("](results/pareto.svg)") == 1


def test_the_section_of_the_results_is_up_to_date() -> None:
    from scripts.reproduce.summary import summary
    from scripts.reproduce.tables import SECTION, section

    folder = "results/shapes/reproduce"
    path = ROOT / folder / "summary.json"
    answer = json.loads(path.read_text("utf-8")) if path.is_file() else summary({})
    plot = f"../{folder}/pareto.svg" if (ROOT / folder / "pareto.svg").is_file() else None
    [text] = SECTION.findall((ROOT / "docs" / "results.md").read_text("utf-8"))
    assert text == section(answer, plot), "run: python -m scripts.reproduce --table"
