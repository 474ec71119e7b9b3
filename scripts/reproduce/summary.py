"""All results that are there, as one dict: rows pooled over their seeds, and what was expected.

Seeds differ in training and in the captions drawn, so a row's images of all seeds are pooled. The
intervals are of images; how much a training differs from the next, the seeds' own scores show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from calib.score.rates import wilson
from scripts.reproduce.rows import Row, rows_of
from scripts.reproduce.work import Settings, finished, result_file

Z = 1.959964  # 95 %
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # row -> seed -> what work.work wrote
Rate = dict[str, float | int]


def gather(settings: Settings) -> tuple[dict[str, dict[int, dict[str, Any]]], list[str]]:
    """(row -> seed -> result, names of files left out because they are of other settings)."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    other = []
    for row in rows_of(settings.world):
        stem = result_file(row, 0, settings).name.removesuffix("0.json")
        names = (path.name for path in settings.results.glob(f"{stem}*.json"))
        seeds = sorted(int(name.removeprefix(stem).removesuffix(".json")) for name in names)
        for seed in seeds:
            if result := finished(row, seed, settings):
                found.setdefault(row.name, {})[seed] = result
            else:
                other.append(result_file(row, seed, settings).name)
    return found, other


def summary(
    results: Results, left_out: Sequence[str] = (), world: str = "shapes"
) -> dict[str, Any]:
    """Rows, expectations, and on what machines and days, from results of the same settings."""
    every = [result for seeds in results.values() for result in seeds.values()]
    return {
        "format": 1,
        "world": world,
        "rows": [_row(row, results) for row in rows_of(world)],
        "checks": [check(each, results) for each in EXPECTED[world]],
        "left_out": sorted(left_out),
        "dates": sorted({result["date"] for result in every}),
        "machines": sorted({_machine(result["machine"]) for result in every}),
    }


def pooled(rates: Iterable[Mapping[str, Any]]) -> Rate:
    """Rates (score, n) of several runs as one: share of all their images, Wilson interval."""
    rates = list(rates)
    n = sum(rate["n"] for rate in rates)
    return rate_of(sum(round(rate["score"] * rate["n"]) for rate in rates), n)


def rate_of(successes: int, n: int) -> Rate:
    """score, low, high, n."""
    low, high = wilson(successes, n, Z)
    score = round(successes / n, 4)
    return {"score": score, "low": round(low, 4), "high": round(high, 4), "n": n}


def ratio(a: Rate, b: Rate) -> dict[str, float | None]:
    """a's score over b's with its 95 % interval (Katz's logarithm, as of separate samples).

    Models generate the same captions from the same noise, so the true interval is narrower. None
    where a score is 0.
    """
    if not a["score"] or not b["score"]:
        return {"value": 0.0 if b["score"] else None, "low": None, "high": None}
    value = a["score"] / b["score"]
    width = Z * math.sqrt(sum((1 - rate["score"]) / (rate["n"] * rate["score"]) for rate in (a, b)))
    low, high = value * math.exp(-width), value * math.exp(width)
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}


def difference(a: Rate, b: Rate) -> dict[str, float]:
    """a's score less b's with its 95 % interval (Newcombe's, from both Wilson intervals)."""
    value = a["score"] - b["score"]
    down = math.hypot(a["score"] - a["low"], b["high"] - b["score"])
    up = math.hypot(a["high"] - a["score"], b["score"] - b["low"])
    bounds = {"value": value, "low": value - down, "high": value + up}
    return {name: round(x, 4) for name, x in bounds.items()}


# ---------------------------------------------------------------- what was expected

# World -> (test, row, what it is compared with)
Expected = tuple[str, str, float | str]
_PAPER: tuple[Expected, ...] = (
    ("keeps", "L", 0.95),
    ("keeps", "S", 0.85),
    ("keeps", "XS", 0.75),
    ("clearly over", "L", "width-1.5"),
    ("not worse than", "L", "width-2"),
    ("clearly over", "S", "depth-first"),
    ("clearly over", "S", "depth-middle"),
    ("over", "L", "random"),
    ("over", "S", "joint"),
)
EXPECTED: dict[str, tuple[Expected, ...]] = {
    "shapes": (
        *_PAPER,
        ("over", "budget", "S"),
        ("keeps", "L-long", 0.95),
        ("keeps", "S-long", 0.85),
        ("keeps", "XS-long", 0.75),
        ("keeps", "XS-joint-long", 0.75),
        ("clearly over", "L-long", "width-1.5-long"),
        ("clearly over", "S-long", "depth-first-long"),
        ("clearly over", "XS-long", "XS-first-long"),
        ("clearly over", "XS", "XS-first"),
        ("clearly over", "joint", "depth-first-joint"),
        ("clearly over", "L-quarter", "width-0.375"),
        ("clearly over", "L-quarter-joint", "width-0.375"),
    ),
    "emoji": (
        *_PAPER,
        ("clearly over", "S", "depth-linear"),
        ("over", "L", "L-joint"),
        ("clearly over", "L-joint", "width-1.5"),
        ("not worse than", "L-joint", "width-2"),
        ("clearly over", "joint", "depth-first-joint"),
        ("clearly over", "XS", "XS-first"),
        ("clearly over", "XS", "XS-linear"),
        ("clearly over", "L-local", "width-1.5-local"),
        ("clearly over", "L-polished", "width-1.5-polished"),
        ("clearly over", "L-joint-longer", "width-1.5-longer"),
        ("keeps", "L-polished", 0.95),
    ),
}
TESTS = {
    "keeps": "the score over the dense one's",
    "clearly over": "a higher score, and 95 % intervals that do not meet",
    "over": "a higher score",
    "not worse than": "the 95 % interval of the difference reaches 0 (Newcombe's): no proof of "
    "being worse, not a proof of being as good",
}


def check(expected: Expected, results: Results) -> dict[str, Any]:
    """One expectation against the results, over the seeds that both rows have.

    `state`: met, not met, or not yet measured; `figure`: the ratio or the difference it was read
    from, with its interval; `certain`: whether that interval excludes the bound.
    """
    test, row, against = expected
    keeps = test == "keeps"
    other = "dense" if keeps else str(against)
    words = f"{row} keeps {100 * float(against):g} % of dense" if keeps else f"{row} {test} {other}"
    answer: dict[str, Any] = {"expected": words, "kind": test, "test": TESTS[test]}
    answer |= {"state": "not yet measured", "seeds": []}
    answer |= dict.fromkeys(("scores", "figure", "certain"))
    seeds = common(results, row, other)
    if not seeds:
        return answer
    a, b = (_over(results[name], seeds) for name in (row, other))
    figure = ratio(a, b) if keeps else difference(a, b)
    bound = float(against) if keeps else 0.0
    fine = {
        "keeps": (figure["value"] or 0.0) >= bound,
        "over": a["score"] > b["score"],
        "clearly over": a["low"] > b["high"],
        "not worse than": (figure["high"] or 0.0) >= 0,
    }[test]
    low, high = figure["low"], figure["high"]
    certain = low is not None and high is not None and not low <= bound <= high
    answer |= {"state": "met" if fine else "not met", "seeds": seeds, "figure": figure}
    return answer | {"scores": {row: a, other: b}, "certain": certain}


def common(results: Results, *names: str) -> list[int]:
    """Seeds with which every one of these rows is done."""
    found = [set(results.get(name, {})) for name in names]
    return sorted(set.intersection(*found))


# ---------------------------------------------------------------- rows


def kind_of(row: Row) -> str:
    """What a plot shows the row as (d2m.report.pareto.KINDS)."""
    if row.of:
        return "knob"
    if row.recipe is None:
        return "dense"
    if row.name.removesuffix("-long") in ("L", "M", "S", "XS"):
        return "sparse"
    return (
        "pruned" if row.name.startswith(("width", "depth", "XS-first", "XS-linear")) else "variant"
    )


def _row(row: Row, results: Results) -> dict[str, Any]:
    """The row over its seeds; without results, what it is and nulls."""
    found = results.get(row.name, {})
    answer: dict[str, Any] = {
        "name": row.name,
        "says": row.says,
        "kind": kind_of(row),
        "of": row.of,
        "seeds": sorted(found),
    }
    if not found:
        return answer | {"score": None}
    last = found[max(found)]
    seeds = common(results, row.name, "dense")
    share = None
    if seeds and row.name != "dense":
        share = ratio(_over(found, seeds), _over(results["dense"], seeds)) | {"seeds": seeds}
    names = dict.fromkeys(name for each in found.values() for name in each["score"]["categories"])
    every = [each["score"]["categories"] for each in found.values()]
    return answer | {
        "score": _over(found, sorted(found)),
        "per_seed": {str(seed): found[seed]["score"]["overall"]["score"] for seed in sorted(found)},
        "categories": {name: pooled(c[name] for c in every if name in c) for name in names},
        "of_dense": share,
        "steps": _steps(last["identity"]),
        "conversion_seconds": sum(each["seconds"]["conversion"] for each in found.values()),
        **last["cost"],
    }


def _over(found: Mapping[int, Mapping[str, Any]], seeds: Sequence[int]) -> Rate:
    return pooled(found[seed]["score"]["overall"] for seed in seeds)


def _steps(identity: Mapping[str, Any]) -> int:
    """Training steps of a row, those of the row it starts from counted."""
    stages = [stage for recipe in identity["recipes"] for stage in recipe["stages"]]
    return sum(stage["steps"] for stage in stages if not stage.get("skip"))


def _machine(facts: Mapping[str, Any]) -> str:
    return f"{facts['device']}, {facts['cpus']} CPU cores, torch {facts['torch']}"
