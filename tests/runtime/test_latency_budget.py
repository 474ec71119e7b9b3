"""A budget picks from what was measured here, says what it lacks, and is kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime import latency_budget as budgettable
from runtime.image import settings_of, to_png
from runtime.latency_budget import pick_row
from runtime.measure.latency import columns, measure
from runtime.pipeline import Pipeline

PROMPT = "a photo of a red circle"
KEY = {"images": 1, "width": 32, "height": 32, "backend": "ort"}


def row(steps: int, top_k: int, slowest: float, deviation: float) -> dict[str, Any]:
    knobs = {"steps": steps, "top_k": top_k, "kappa": None}
    return {**knobs, "seconds": slowest / 2, "slowest": slowest, "deviation": deviation}


TABLE = {
    "for": KEY,
    "rows": [row(16, 2, 1.0, 0.0), row(8, 2, 0.5, 0.1), row(16, 1, 0.7, 0.05), row(1, 0, 0.1, 0.4)],
}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(None, "ort", threads=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2M_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("seconds", "given", "expected"),
    [
        (5, {}, (16, 2)),
        (1.0, {}, (16, 2)),
        (0.99, {}, (16, 1)),
        (0.6, {}, (8, 2)),
        (0.2, {}, (1, 0)),
        (5, {"steps": 8}, (8, 2)),
        (5, {"top_k": 1}, (16, 1)),
    ],
)
def test_the_nearest_setting_that_fits(
    seconds: float, given: dict[str, int], expected: tuple[int, int]
) -> None:
    found = pick_row(TABLE, seconds, given)
    assert (found["steps"], found["top_k"]) == expected


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError) as caught:
        pick_row(TABLE, 0.05)
    assert str(caught.value) == (
        "budget is 0.05 s, but the fastest of 4 measured settings took 0.1 s for 1 image of"
        " 32 x 32 on ort (steps 1, top_k 0), expected that much at least; give it more time or"
        " generate a smaller image."
    )
    with pytest.raises(ValueError, match="the fastest of 2 measured settings took 0.7 s"):
        pick_row(TABLE, 0.05, {"steps": 16})
    with pytest.raises(ValueError, match="has no steps 5 among what was measured.*--steps"):
        pick_row(TABLE, 9, {"steps": 5})


def test_measured_and_kept(pipeline: Pipeline, cache: Path) -> None:
    told: list[tuple[str, int, int]] = []
    table = measure(
        pipeline,
        steps=[1, 3],
        top_k=[1],
        repeats=2,
        prompts=[PROMPT],
        progress=lambda *state: told.append(state),
    )
    own = pipeline.manifest["defaults"]["steps"]
    settings = [(r["steps"], r["top_k"]) for r in table["rows"]]
    assert settings[0] == (own, 2) and table["rows"][0]["deviation"] == 0
    assert set(settings) == {(s, k) for s in (1, 3, own) for k in (1, 2)}
    assert told[0] == ("measure", 0, 12) and told[-1] == ("measure", 12, 12)
    rows = dict(zip(settings, table["rows"], strict=True))
    assert all(0 < r["seconds"] <= r["slowest"] for r in table["rows"])
    assert rows[1, 2]["deviation"] > rows[3, 2]["deviation"] > 0  # fewer steps, farther away
    assert rows[own, 1]["deviation"] > 0
    (place,) = (cache / "budgets").iterdir()
    assert json.loads(place.read_text()) == table
    # The call: as if the picked numbers had been given.
    plenty = pipeline(PROMPT, seed=4, budget=100)
    assert to_png(plenty) == to_png(pipeline(PROMPT, seed=4))
    for line in table["rows"]:  # times that do not hang on how busy this machine was
        line["slowest"] = line["steps"] / 10
    place.write_text(json.dumps(table))
    said = settings_of(pipeline(PROMPT, seed=4, budget=0.35))
    assert (said["steps"], said["top_k"]) == (3, 2)
    settled = pipeline(PROMPT, seed=4, budget=100, top_k=1)
    assert settings_of(settled)["top_k"] == 1 and settings_of(settled)["steps"] == own
    with pytest.raises(ValueError, match="budget is 1e-06 s, but the fastest of 6"):
        pipeline(PROMPT, budget=1e-6)
    head, lines = columns(table)
    assert len(lines) == 6 and all(len(line) == len(head) for line in lines)
    assert lines[0][-1] == "yes"


def test_it_counts_only_for_what_was_measured(
    pipeline: Pipeline, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no budget was measured for 1 image of 32 x 32.*d2m mea"):
        pipeline(PROMPT, budget=1)
    measure(pipeline, steps=[1], top_k=[2], repeats=1, prompts=[PROMPT])
    pipeline(PROMPT, budget=100)
    with pytest.raises(ValueError, match="for 2 images of 32 x 32.* -n 2"):
        pipeline(PROMPT, n=2, budget=100)
    with pytest.raises(ValueError, match="for 1 image of 64 x 32.*--height 32 --width 64"):
        pipeline(PROMPT, width=64, budget=100)
    other = Pipeline(pipeline.bundle, "ort", threads=1, offload="block")
    with pytest.raises(ValueError, match="no budget was measured"):
        other(PROMPT, budget=100)
    monkeypatch.setattr(budgettable, "machine", lambda: {"processor": "another"})
    with pytest.raises(ValueError, match="no budget was measured"):
        pipeline(PROMPT, budget=100)


def test_a_table_that_is_damaged_is_named(pipeline: Pipeline, cache: Path) -> None:
    measure(pipeline, steps=[1], top_k=[2], repeats=1, prompts=[PROMPT])
    (place,) = (cache / "budgets").iterdir()
    table = json.loads(place.read_text())
    place.write_text("{")
    with pytest.raises(ValueError, match="is no JSON.*d2m measure"):
        pipeline(PROMPT, budget=1)
    for change in ({"for": {}}, {"rows": [{"steps": 1}]}, {"rows": 3}):
        place.write_text(json.dumps({**table, **change}))
        with pytest.raises(ValueError, match="was changed after it was written; measure it with"):
            pipeline(PROMPT, budget=1)


def test_what_cannot_be_asked(
    pipeline: Pipeline, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (0, -1, "1", True, float("nan")):
        with pytest.raises(ValueError, match="budget is .*, expected seconds above 0"):
            pipeline(PROMPT, budget=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k is .* with a budget, expected one number"):
        pipeline(PROMPT, budget=1, steps=2, top_k=[1, 2])
    with pytest.raises(ValueError, match="top_k is 3, expected one of 0, 1, 2, 4"):
        measure(pipeline, steps=[1], top_k=[3])
    monkeypatch.setenv("D2M_CACHE", "")
    with pytest.raises(ValueError, match="D2M_CACHE is empty"):
        pipeline(PROMPT, budget=1)


def test_groups_are_measured_too(tiny_forecast_bundle: Path, cache: Path) -> None:
    grouped = Pipeline(tiny_forecast_bundle, "ort", threads=1)
    table = measure(grouped, steps=[2], top_k=[1], kappa=[1, 2], repeats=1, prompts=[PROMPT])
    assert {r["kappa"] for r in table["rows"]} == {1, 2}
    drawn = grouped(PROMPT, budget=100, kappa=2, steps=2)
    assert settings_of(drawn)["kappa"] == 2


def test_from_the_command_line(tmp_path: Path, cache: Path, capsys: Any) -> None:
    from d2m.cli import main

    out = str(tmp_path / "a.png")
    assert main(["run", PROMPT, "-o", out, "--budget", "9"]) == 2
    assert "no budget was measured" in capsys.readouterr().err
    few = ["--steps", "1", "--top-k", "2", "--repeats", "1"]
    assert main(["measure", *few, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    assert main(["measure", *few]) == 0
    assert "deviation" in capsys.readouterr().out
    assert main(["run", PROMPT, "-o", out, "--budget", "90", "--steps", "1"]) == 0
    assert settings_of(out)["steps"] == 1
    assert main(["run", PROMPT, "-o", out, "--budget", "1e-9"]) == 2
    assert "the fastest of 2 measured settings took" in capsys.readouterr().err
    assert main(["run", PROMPT, "-o", out, "--sigmas", "1,.6,.2", "--offload", "block"]) == 0
    assert settings_of(out)["sigmas"] == [1, 0.6, 0.2] and settings_of(out)["steps"] == 3
    assert main(["run", PROMPT, "-o", out, "--sigmas", "high"]) == 2
