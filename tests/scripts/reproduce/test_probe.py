"""Linear probes: what a linear map replaces, of which runs, and on which model it was measured."""

import json
from pathlib import Path

import pytest
import torch

from scripts.reproduce import probe
from scripts.reproduce.baselines import best_run
from scripts.reproduce.rows import named, rows_of
from tests.tiny.pipeline import tiny_inputs, tiny_transformer


def test_a_linear_change_has_no_error_and_noise_has_all():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    y = x @ torch.randn(8, 5, generator=generator) + 3
    noise = torch.randn(4000, 5, generator=generator) * y.std()
    assert probe.linear_error(x, y) < 1e-6
    assert probe.linear_error(x, noise) == pytest.approx(1, abs=0.02)
    both = probe.linear_error(x, y - y.mean(0) + noise)
    assert both == pytest.approx(0.5, abs=0.05)


def test_runs_of_a_model_are_measured_from_what_enters_to_what_leaves():
    model = tiny_transformer(num_layers=3, num_single_layers=2)
    data = [tiny_inputs(seed, batch=8) for seed in range(3)]
    with torch.no_grad():  # a block that only scales: linear to the last digit
        plain = model.transformer_blocks[1]
        for weight in plain.norm1.linear.parameters():
            weight.zero_()
        for weight in plain.norm1_context.linear.parameters():
            weight.zero_()
    errors = probe.measure(model, data, longest=2)
    assert {kind: [*found] for kind, found in errors.items()} == {
        "double": ["0-0", "0-1", "1-1", "1-2", "2-2"],
        "single": ["0-0", "0-1", "1-1"],
    }
    double = errors["double"]
    assert double["1-1"] < 1e-4 and double["0-0"] > 1e-3
    # The block hands on what enters: runs with it err as without it.
    assert double["0-1"] == pytest.approx(double["0-0"], rel=1e-3)
    assert double["1-2"] == pytest.approx(double["2-2"], rel=1e-3)


def test_the_run_that_errs_least_is_chosen():
    errors = {"0-0": 0.1, "0-1": 0.4, "1-2": 0.2, "2-3": 0.3, "1-3": 0.01}
    assert best_run(errors, 2) == 1
    with pytest.raises(ValueError, match="no run of 4 blocks was measured"):
        best_run(errors, 4)


def test_what_was_measured_on_another_model_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(probe, "HERE", tmp_path)
    dense = tmp_path / "some-dense"
    (dense / "transformer").mkdir(parents=True)
    weights = dense / "transformer" / "model.safetensors"
    weights.write_bytes(b"one")
    with pytest.raises(FileNotFoundError, match="measure them with `python -m scripts"):
        probe.read_runs(dense)
    found = {"transformer": probe.digest(dense), "runs": {"double": {"0-1": 0.5}}}
    probe.file_of(dense).write_text(json.dumps(found))
    assert probe.read_runs(dense) == {"double": {"0-1": 0.5}}
    weights.write_bytes(b"two")
    with pytest.raises(ValueError, match="was measured on another model"):
        probe.read_runs(dense)


def test_each_world_has_its_rows_and_every_row_its_start():
    for world in ("shapes", "emoji"):
        rows = rows_of(world)
        names = [row.name for row in rows]
        assert names[0] == "dense" and len(set(names)) == len(names)
        for row in rows:
            assert named(row.name).recipe is row.recipe
            assert row.needs is None or row.needs in names
    assert {"depth-linear", "L-joint", "L k=0"} <= {row.name for row in rows_of("emoji")}
    with pytest.raises(ValueError, match="expected shapes or emoji"):
        rows_of("letters")
