"""Two models on the same captions: counts of pairs, and a sheet of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calib.score.grid import BAD, GOOD
from calib.score.loop import Sample
from calib.score.pairs import paired, save_pairs


@dataclass(frozen=True)
class Scene:
    category: str
    caption: str


@dataclass(frozen=True)
class Verdict:
    ok: bool
    reason: str = ""


def samples(oks: list[bool], value: int) -> list[Sample[Scene, Verdict]]:
    image = np.full((32, 32, 3), (value, 7, 9), np.uint8)
    scenes = [Scene("one" if i % 2 else "two", f"a thing of number {i}") for i in range(len(oks))]
    return [Sample(scene, i, image, Verdict(ok)) for i, (scene, ok) in enumerate(zip(scenes, oks))]


def test_counts() -> None:
    first = samples([True, True, True, False, False, True], 0)
    second = samples([True, False, True, True, False, True], 0)
    assert paired(first, second) == {"both": 3, "first_only": 1, "second_only": 1, "neither": 1}
    for other in (second[:-1], second[::-1], []):
        with pytest.raises(ValueError, match="the same captions and seeds"):
            paired(first, other)
    with pytest.raises(ValueError, match="at least one"):
        paired([], [])


def test_a_sheet_has_a_row_a_model(tmp_path: Path) -> None:
    first, second = samples([True] * 12, 40), samples([False] * 12, 90)
    save_pairs(first, second, ("dense: 100 %", "sparse: 0 %"), tmp_path / "pairs.png")
    sheet = np.asarray(Image.open(tmp_path / "pairs.png").convert("RGB"))
    for value, border in ((40, GOOD), (90, BAD)):
        rows, columns = np.nonzero((sheet == (value, 7, 9)).all(-1))
        assert len(set(columns)) == 8 * 128 and len(set(rows)) == 128
        top = rows.min() - 3
        assert tuple(sheet[top, columns.min()]) == border
    first_rows = np.nonzero((sheet == (40, 7, 9)).all(-1))[0].max()
    assert first_rows < np.nonzero((sheet == (90, 7, 9)).all(-1))[0].min()
