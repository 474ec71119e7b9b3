"""Parity where blocks are in groups: every block and router, what is chosen, the trajectory."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from export.parity.run import parity, tables
from export.plans.build import build_plans, default_profiles
from runtime.bundle.directory import open_bundle
from tests.tiny.bundle import damaged
from tests.tiny.grouped import GROUPS

ALL = {f"{name}.blocks.{i}" for name, (_, blocks) in GROUPS.items() for i in blocks}


@pytest.mark.parametrize(("alpha", "kappa"), [(0.5, 1), (0.5, 2), (0.0, None)])
def test_the_bundle_equals_torch(
    request: pytest.FixtureRequest, alpha: float, kappa: int | None
) -> None:
    name = "grouped" if alpha else "forecast"
    directory, bundle = (request.getfixturevalue(f"tiny_{name}_{w}") for w in ("dir", "bundle"))
    result = parity(directory, bundle, steps=2, kappa=kappa)
    assert result["passed"], result["failures"]
    assert result["kappa"] == (kappa or 1)
    places = {row["place"].partition(" ")[0] for row in result["blocks"]}
    assert places >= ALL | set(GROUPS) | {"transformer_blocks.0", "single_transformer_blocks.3"}
    assert {r["tensor"] for r in result["blocks"] if r["place"].startswith(f"{min(GROUPS)} ")} == {
        "logits"
    }
    groups = result["groups"]
    assert groups["sure_agreement"] == 1 and groups["sure_tokens"] > 0
    assert groups["tokens"] == 2 * 2 * 2  # groups, recorded steps, prompts
    assert result["experts"]["sure_agreement"] == 1
    assert all(row["relative_error"] < 1e-4 for row in result["trajectory"]["steps"])
    from rich.console import Console

    json.dumps(result, allow_nan=False)
    console = Console(width=120, file=io.StringIO())
    for part in tables(result):
        console.print(part)
    assert "groups: 100.0000% of 8 choices of blocks agree" in console.file.getvalue()


def test_all_blocks_choose_nothing(tiny_grouped_dir: Path, tiny_grouped_bundle: Path) -> None:
    result = parity(tiny_grouped_dir, tiny_grouped_bundle, steps=1, kappa=3)
    assert result["passed"] and result["groups"] is None


def test_a_wrong_router_is_found_and_named(
    tiny_grouped_dir: Path, tiny_grouped_bundle: Path, tmp_path: Path
) -> None:
    name = "transformer_blocks.1"
    broken = damaged(tiny_grouped_bundle, tmp_path / "b", f"{name}.router.embedding.weight")
    result = parity(tiny_grouped_dir, broken, steps=1)
    bad = {row["place"] for row in result["blocks"] if not row["passed"]}
    assert not result["passed"] and bad == {f"{name} (step 0)"}


def test_of_groups_and_none(tiny_sparse_dir: Path, tiny_grouped_bundle: Path) -> None:
    with pytest.raises(ValueError, match="only one has groups of blocks"):
        parity(tiny_sparse_dir, tiny_grouped_bundle, steps=1)


@pytest.mark.tensorrt
def test_plans_of_blocks_and_routers_hold_no_conditional(
    tiny_grouped_bundle: Path, tiny_forecast_bundle: Path, tmp_path: Path
) -> None:
    """TensorRT-RTX without a GPU: the host decides, a block's plan only runs."""
    for path, read in ((tiny_grouped_bundle, 3), (tiny_forecast_bundle, 1)):
        bundle = open_bundle(path)
        types = bundle.component("transformer")["types"]
        graphs: dict[str, Any] = {
            f"transformer/{kind}{f'.k{key}' if key else ''}": bundle.file(row["graphs"][key])
            for kind, row in types.items()
            for key in ("", "2")
            if key in row["graphs"]
        }
        if read == 1:
            graphs = {"transformer/router": graphs["transformer/router"]}
        profiles = default_profiles(bundle.manifest)
        (entry,) = build_plans(
            graphs, tmp_path, api="tensorrt_rtx", dtype="float32", profiles=profiles
        ).values()
        assert "transformer/router" in entry["files"]
        assert not any(row["conditionals"] + row["host_copies"] for row in entry["layers"].values())
        router = entry["tensors"]["transformer/router"]
        weights = 2 if read == 3 else 1  # with alpha 0 neither tokens nor their weights are read
        assert len(router["inputs"]) == read + weights
        assert router["outputs"][0]["dtype"] == "float32"
