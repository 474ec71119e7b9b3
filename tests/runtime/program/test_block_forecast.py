"""The block schedule before the first step is torch's, and drawing with it changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.families.flow_matching import sigmas
from runtime.inspect.block_table import columns, forecast_table, span
from runtime.pipeline import Pipeline
from tests.tiny.grouped import GROUPS

PROMPT = "two rings above a star"


@pytest.fixture(scope="module")
def pipeline(tiny_forecast_bundle: Path) -> Pipeline:
    return Pipeline(tiny_forecast_bundle, "ort", threads=1, mode="blocks")


@pytest.mark.parametrize("kappa", [1, 2])
def test_the_schedule_is_torchs(pipeline: Pipeline, tiny_forecast_dir: Path, kappa: int) -> None:
    import torch

    from d2m.generate import load_pipeline
    from d2m.model.block_group import set_kappa
    from tests.cases.block_schedule import block_schedule

    answer = forecast_table(pipeline, PROMPT, steps=5, kappa=kappa)
    pipe = load_pipeline(tiny_forecast_dir, device="cpu", dtype="fp32")
    set_kappa(pipe.transformer, kappa)
    with torch.no_grad():
        _, pooled, _ = pipe.encode_prompt(PROMPT, None)
    guidance = pipeline.manifest["defaults"]["guidance"]
    expected = block_schedule(pipe.transformer, answer["sigmas"], pooled, guidance)
    assert [row["name"] for row in answer["groups"]] == list(expected)
    for row in answer["groups"]:
        first = expected[row["name"]][:, 0].tolist()
        assert row["runs"] == [list(range(i, i + kappa)) for i in first]
    config, tokens = pipeline.manifest["scheduler"], 16
    np.testing.assert_allclose(answer["sigmas"], sigmas(config, 5, tokens)[:-1])


def test_generating_runs_no_router_and_gives_the_same(
    pipeline: Pipeline, tiny_forecast_bundle: Path
) -> None:
    """With the schedule, without it, and as a whole graph; samples of a batch for themselves."""
    executor: Any = pipeline.executor("transformer")
    routers: list[str] = []
    run_router = executor.run_router

    def spy(*arguments: Any) -> Any:
        routers.append("asked")
        return run_router(*arguments)

    executor.run_router = spy
    prompts = [PROMPT, "a red circle", "five"]
    found = pipeline(prompts, steps=4, kappa=[1, 2, 1, 3])
    assert not routers
    whole = Pipeline(tiny_forecast_bundle, "ort", threads=1)(prompts, steps=4, kappa=[1, 2, 1, 3])
    for first, second in zip(found, whole, strict=True):
        assert np.abs(np.asarray(first).astype(int) - np.asarray(second)).max() <= 1
    executor.run_router = run_router


def test_a_table_has_a_line_a_step(pipeline: Pipeline) -> None:
    head, lines = columns(forecast_table(pipeline, PROMPT, steps=2, kappa=[2, 3]))
    assert head == ["step", "sigma", "kappa", "double 1-3", "single 0-2"]
    assert len(lines) == 2 and lines[1][3:] == ["1-3", "0-2"] and lines[0][2] == 2
    assert span([4]) == "4" and span([4, 5, 6]) == "4-6"


def test_what_an_image_says_has_kappa(pipeline: Pipeline) -> None:
    from runtime.image import settings_of

    image = pipeline(PROMPT, steps=2, kappa=[2, 1])
    assert settings_of(image)["kappa"] == [2, 1]
    assert settings_of(pipeline(PROMPT, steps=2))["kappa"] == 1


def test_kappa_is_checked(pipeline: Pipeline, tiny_bundle: Path) -> None:
    for kappa, words in (
        (0, "kappa is 0, expected a whole number from 1 to 3"),
        (4, "kappa is 4"),
        (True, "kappa is True"),
        ([1], "kappa lists 1 numbers for 2 steps"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline(PROMPT, steps=2, kappa=kappa)
    with pytest.raises(ValueError, match="kappa is 1, expected none: this bundle's blocks are in"):
        Pipeline(tiny_bundle, "ort", threads=1)("a", steps=1, kappa=1)


def test_groups_by_name(pipeline: Pipeline) -> None:
    answer = forecast_table(pipeline, PROMPT, steps=1)
    assert {row["name"]: (row["list"], tuple(row["blocks"])) for row in answer["groups"]} == GROUPS
