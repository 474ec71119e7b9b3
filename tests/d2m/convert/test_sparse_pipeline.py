"""What a conversion leaves behind: pictures and scores of both models, figures of the log."""

import pytest

from d2m.convert.sparse_pipeline import compare, final_losses, stage_seconds, timed
from d2m.generate import load_pipeline
from tests.tiny.pipeline import tiny_pipeline, tiny_transformer

HISTORY = [
    {"stage": "shared", "seconds": 2.04, "output": 3.0},
    {"stage": "shared", "seconds": 4.0, "output": 2.0},
    {"stage": "experts", "seconds": 9.5, "output": 1.5},
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tiny_pipeline(tmp_path_factory.mktemp("dense"))
    (path / "defaults.json").write_text('{"num_inference_steps": 2}')
    return path


def test_pictures_and_scores_of_both(dense):
    pipe = load_pipeline(dense)
    teacher, student, calls, phases = pipe.transformer, tiny_transformer(7), [], []

    def score(draw):
        calls.append(draw(["a red circle"], [5])[0])
        return {"overall": len(calls)}

    images, scores = compare(
        pipe, student, dense, ["a", "two"], score, 3, lambda *phase: phases.append(phase)
    )
    assert scores == {"dense": {"overall": 1}, "sparse": {"overall": 2}}
    assert [(row["prompt"], row["seed"]) for row in images] == [
        ("a", 3_000_000),
        ("two", 3_000_001),
    ]
    assert all(row["dense"].size == (16, 16) for row in images)
    assert all(row["dense"].tobytes() != row["sparse"].tobytes() for row in images)
    assert calls[0].tobytes() != calls[1].tobytes()
    assert pipe.transformer is teacher
    assert [phase[1:] for phase in phases] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_same_model_same_pictures_and_no_score(dense):
    pipe = load_pipeline(dense)
    images, scores = compare(pipe, pipe.transformer, dense, ["a"], None, 0)
    assert images[0]["dense"].tobytes() == images[0]["sparse"].tobytes() and scores == {}
    assert compare(pipe, pipe.transformer, dense, [], None, 0) == ([], {})


def test_pipeline_is_restored_after_an_error(dense):
    pipe = load_pipeline(dense)
    teacher = pipe.transformer

    def failing(draw):
        raise RuntimeError(type(pipe.transformer).__name__)

    with pytest.raises(RuntimeError, match="FluxTransformer2DModel"):
        compare(pipe, tiny_transformer(1), dense, [], failing, 0)
    assert pipe.transformer is teacher


def test_figures_of_the_log():
    assert stage_seconds(HISTORY) == {"stage shared": 4.0, "stage experts": 5.5}
    assert final_losses(HISTORY) == {
        "shared": {"first": 3.0, "last": 2.0},
        "experts": {"first": 1.5, "last": 1.5},
    }
    assert stage_seconds([]) == {} and final_losses([]) == {}


def test_timed():
    seconds = {}
    with timed(seconds, "x"):
        pass
    assert seconds == {"x": 0.0}
