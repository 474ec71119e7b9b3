"""Experts by image position: cells, counts and what a position tells, by hand."""

import math

import pytest
import torch

from calib.measure.image_positions import choices_by_cell, image_cells, position_figures
from tests.tiny.pipeline import tiny_inputs


def ids(rows: int, columns: int) -> torch.Tensor:
    places = [(0, row, column) for row in range(rows) for column in range(columns)]
    return torch.tensor(places, dtype=torch.float32)


def test_cells_of_small_and_of_large_pictures() -> None:
    cells, shape = image_cells(ids(2, 3))
    assert cells.tolist() == [0, 1, 2, 3, 4, 5] and shape == (2, 3)
    cells, shape = image_cells(ids(4, 6), most=3)
    assert shape == (3, 3)
    assert cells.reshape(4, 6).tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 1, 1, 2, 2],
        [3, 3, 4, 4, 5, 5],
        [6, 6, 7, 7, 8, 8],
    ]
    assert image_cells(tiny_inputs()["img_ids"])[1] == (4, 4)


def test_choices_are_counted_by_cell_and_text_is_left_out() -> None:
    logits = torch.zeros(2, 5, 3)  # a text token, then four of the picture
    logits[:, 0, 2] = 9  # the text's choice must not count
    logits[:, 1:3, 0] = 9
    logits[0, 3:, 1], logits[1, 3:, 2] = 9, 9
    counts = choices_by_cell(logits, 1, torch.tensor([0, 0, 1, 1]), 2)
    assert counts.tolist() == [[4, 0], [0, 2], [0, 2]]
    assert choices_by_cell(logits, 2, torch.tensor([0, 0, 1, 1]), 2).sum() == 16


def test_what_the_position_tells() -> None:
    share = position_figures(torch.tensor([[3.0, 0.0], [1.0, 4.0]], dtype=torch.float64))["share"]
    assert share == [[0.75, 0.0], [0.25, 1.0]]
    told = position_figures(torch.eye(4, dtype=torch.float64) * 1e6)
    assert told["information"] == pytest.approx(1, abs=1e-4)
    even = position_figures(torch.full((4, 4), 1e6, dtype=torch.float64))
    assert even["information"] == 0
    # Two experts, halves of the picture: .75 ln 1.5 + .25 ln .5, less 1 / 2N.
    counts = torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.float64) * 1000
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5) - 1 / 16000) / math.log(2)
    assert position_figures(counts)["information"] == pytest.approx(expected, abs=1e-6)
    nothing = position_figures(torch.zeros(3, 2, dtype=torch.float64))
    assert nothing == {"share": [[0.0, 0.0]] * 3, "information": 0.0}


def test_chance_alone_tells_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    told = []
    for _ in range(20):
        logits = torch.randn(8, 16, 12, generator=generator)
        counts = choices_by_cell(logits, 2, torch.arange(16), 16)
        told.append(position_figures(counts)["information"])
    assert sum(told) / len(told) < 0.02  # .13 without the correction
