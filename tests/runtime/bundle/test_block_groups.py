"""Groups in a manifest and in numpy: what is refused, who chooses what, where a program is cut."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.block_groups import (
    can_forecast,
    choosing_groups,
    first_calls,
    groups_of,
    largest_kappa,
    per_sample,
    runs_of,
    sections,
)
from runtime.bundle.directory import open_bundle
from runtime.bundle.manifest import check
from runtime.program.executor import run_program

GROUP = "components.transformer.groups.transformer_blocks.1"


@pytest.fixture(scope="module")
def manifest(tiny_grouped_bundle: Path) -> dict[str, Any]:
    return json.loads((tiny_grouped_bundle / "manifest.json").read_text())


def group(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["components"]["transformer"]["groups"]["transformer_blocks.1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: group(m).update(calls=[9, 10, 11]),
            rf"{GROUP}.calls .* is \[9, 10, 11\], expected places from 0 to 9",
        ),
        (
            lambda m: group(m).update(calls=[4, 5, 6]),
            r"\[5, 6\] is in two|expected calls of no other group",
        ),
        (lambda m: group(m).update(calls=[2, 4]), "expected two or more neighbours"),
        (lambda m: group(m).update(calls=[2]), "expected two or more neighbours"),
        (lambda m: group(m).update(calls=["2", 3]), "expected a list of places in the program"),
        (lambda m: group(m).update(calls=[8, 9]), "expected calls of no other|blocks that replace"),
        (lambda m: group(m).update(calls=[0, 1, 2]), "expected a type that reads what is known"),
        (lambda m: group(m).update(type="none"), rf"{GROUP}.type .* is 'none', expected one of"),
        (lambda m: group(m).update(type="double"), "expected a type of one graph and one output"),
        (lambda m: group(m).update(alpha=2), rf"{GROUP}.alpha .* is 2, expected a number from 0"),
        (lambda m: m.update(kappa=0), "kappa .* is 0, expected a whole number from 1 to 3"),
        (lambda m: m.update(kappa=4), "kappa .* is 4, expected a whole number from 1 to 3"),
        (lambda m: m.pop("kappa"), "kappa .* is None, expected a whole number from 1 to 3"),
        (lambda m: m["components"]["transformer"].pop("groups"), "expected null in a bundle witho"),
        (lambda m: m["components"]["transformer"].update(groups=[]), "expected an object"),
    ],
)
def test_tampered_groups_are_refused(
    manifest: dict[str, Any], change: Callable[[dict[str, Any]], object], words: str
) -> None:
    check(manifest)
    broken = copy.deepcopy(manifest)
    change(broken)
    with pytest.raises(ValueError, match=words) as caught:
        check(broken)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_router_without_weights_is_refused(tiny_grouped_bundle: Path, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(tiny_grouped_bundle, tmp_path / "bundle"))
    value = json.loads((path / "manifest.json").read_text())
    group(value)["prefix"] = "transformer_blocks.2."
    (path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="has no tensor transformer_blocks.2.router"):
        open_bundle(path)


def test_windows_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for m in (2, 3, 5):
        logits = rng.integers(0, 3, (16, m)).astype(np.float32)  # with ties
        for kappa in range(1, m + 1):
            expected = torch.from_numpy(logits).unfold(-1, kappa, 1).mean(-1).argmax(-1)
            np.testing.assert_array_equal(first_calls(logits, kappa), expected.numpy())


def test_runs_are_rows_by_call() -> None:
    row = {"calls": [4, 5, 6]}
    runs = runs_of(row, np.array([0, 2, 0, 1]), 1)
    assert {call: rows.tolist() for call, rows in runs.items()} == {4: [0, 2], 5: [3], 6: [1]}
    runs = runs_of(row, np.array([1, 1]), 2)
    assert {call: rows.tolist() for call, rows in runs.items()} == {4: []}, "5 and 6 run for all"
    runs = runs_of(row, np.array([0, 1]), 2)
    assert {call: rows.tolist() for call, rows in runs.items()} == {4: [0], 6: [1]}


def test_a_program_is_cut_before_what_is_not_known(manifest: dict[str, Any]) -> None:
    component = manifest["components"]["transformer"]
    double, single = (name for name, _ in groups_of(component))
    assert (double, single) == ("transformer_blocks.1", "single_transformer_blocks.0")
    assert largest_kappa(component) == 3 and not can_forecast(component)
    assert len(choosing_groups(component, 2)) == 2 and choosing_groups(component, 3) == []
    assert list(sections(component, 1, {})) == [(0, 2, double), (2, 5, single), (5, 10, None)]
    assert list(sections(component, 1, {double: np.zeros(1)})) == [(0, 5, single), (5, 10, None)]
    assert list(sections(component, 3, {})) == [(0, 10, None)]
    assert per_sample(component, "temb") and per_sample(component, "hidden_states")
    assert not per_sample(component, "rope_cos")


class Lists:
    """Rows of plain lists."""

    def take(self, value: list[int], chosen: np.ndarray) -> list[int]:
        return [value[i] for i in chosen]

    def put(self, value: list[int], part: list[int], chosen: np.ndarray) -> list[int]:
        found = dict(zip(chosen.tolist(), part, strict=True))
        return [found.get(i, old) for i, old in enumerate(value)]


def test_a_program_runs_the_rows_that_chose() -> None:
    step = {"graphs": {"": "s"}, "inputs": ["x", "rope"], "outputs": ["x"]}
    component = {
        "inputs": {"x": {"shape": ["batch"]}, "rope": {"shape": ["tokens"]}},
        "types": {"step": step},
        "program": [{"type": "step", "prefix": f"{i}."} for i in range(3)],
    }
    seen = []

    def call(index: int, kind: str, key: str, prefix: str, inputs: list[Any]) -> list[Any]:
        seen.append((index, inputs))
        return [[value + 10**index for value in inputs[0]]]

    runs = {0: np.array([2, 0]), 1: np.array([], int)}
    env = {"x": [0, 100, 200], "rope": [7, 7, 7]}
    values = run_program(component, env, None, call, runs=runs, rows=Lists())
    assert seen == [(0, [[200, 0], [7, 7, 7]]), (2, [[1, 100, 201], [7, 7, 7]])]
    assert values["x"] == [101, 200, 301] and env["x"] == [0, 100, 200]
    assert run_program(component, env, None, call, begin=2)["x"] == [100, 200, 300]
    assert run_program(component, env, None, call, end=1)["x"] == [1, 101, 201]
