"""Pairs in --data: every layout gives the same edits, and what lacks a part is left out."""

import json

import numpy as np
import pytest
import torch

from calib.data.option import open_source
from calib.data.source import Pair
from d2m.families.latents import changed_boxes
from tests.tiny import data
from tests.tiny.editing import pairs


def samples(source):
    return [row.read() for shard in source.shards for row in source.rows(shard, 0)]


def test_folder_metadata_and_tar_give_the_same_edits(tmp_path):
    folder = pairs(tmp_path / "pairs")
    (folder / "4.after.png").rename(folder / "4.png")  # the ending .after may be left out
    wanted = [
        (Pair(data.png(100 + i), data.png(i), None if i % 3 else data.png(200 + i)), text)
        for i, text in enumerate(data.CAPTIONS[:6])
    ]
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    shard = data.tar(tmp_path / "a.tar", files)
    rows = []
    for i, (_, text) in enumerate(wanted):
        row = {"before_file_name": f"{i}.before.png", "instruction": text}
        row["file_name" if i == 4 else "after_file_name"] = f"{i}.{'' if i == 4 else 'after.'}png"
        rows.append(json.dumps(row | ({} if i % 3 else {"mask_file_name": f"{i}.mask.png"})))
    for place in (folder, shard):
        source = open_source(str(place))
        assert source.pairs and samples(source) == wanted
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    assert samples(open_source(str(folder))) == wanted


def test_an_edit_without_a_part_is_said(tmp_path):
    folder = pairs(tmp_path / "pairs", 2)
    (folder / "0.after.png").unlink()
    (folder / "1.txt").unlink()
    first, second = (next(open_source(str(folder)).rows(f"{i}.before.png", 0)) for i in range(2))
    with pytest.raises(ValueError, match="the picture after is missing"):
        first.read()
    with pytest.raises(ValueError, match="no instruction, which would be in 1.txt"):
        second.read()
    with pytest.raises(ValueError, match="names three columns"):
        open_source(str(folder), ("a", "b", "c"))


def test_the_box_of_what_differs():
    rng = np.random.default_rng(0)
    before = torch.from_numpy(rng.integers(30, 200, (3, 12, 10, 3), dtype=np.uint8))
    after = before.clone()
    after[0, 3, 2, 1] += 40
    after[0, 7, 5, 0] += 40
    after[1] += 9  # noise of a JPEG
    boxes = changed_boxes(before, after)
    assert boxes[0].sum() == 5 * 4 and boxes[0, 3:8, 2:6].all()
    assert boxes[1].all() and boxes[2].all()
