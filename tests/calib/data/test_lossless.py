"""What decoders lose by default is kept: 16 bits of grey, marks of byte order, captions' bytes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from calib.data.folder import folder_source, prompts_source
from calib.data.pixels import pixels
from calib.data.source import Damaged, checked
from calib.data.webdataset import tar_source
from tests.tiny import data


def saved(array, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


RAMP = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
EIGHT = ((RAMP.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_the_8_bit_picture(format):
    found = pixels(saved(RAMP, format), 64, 64)
    assert np.array_equal(found, pixels(saved(EIGHT, format), 64, 64))
    assert abs(found.mean() - 127.5) < 1 and (found.min(), found.max()) == (0, 255)
    half = np.full((64, 64), 32768, np.uint16)
    assert np.unique(pixels(saved(half, format), 32, 32)).tolist() == [128]


def test_16_bit_grey_turned_and_clear():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = pixels(saved(RAMP, exif=exif), 64, 64)
    assert np.array_equal(turned, pixels(saved(EIGHT, exif=exif), 64, 64))
    assert not np.array_equal(turned, pixels(saved(RAMP), 64, 64))
    clear = pixels(saved(np.full((8, 8), 300, np.uint16), transparency=300), 8, 8)
    assert (clear == 255).all()


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_white_are_damaged(kind):
    with pytest.raises(Damaged, match="numbers without a known range; save it in 8 bits"):
        pixels(saved(np.full((8, 8), 0.5).astype(kind), "TIFF"), 8, 8)


def captions(source):
    return [row.read()[1] for shard in source.shards for row in source.rows(shard, 0)]


def test_marks_of_byte_order_are_no_part_of_a_caption(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.png").write_bytes(data.png(0))
    (tmp_path / "files/a.txt").write_text("a red circle", "utf-8-sig")
    assert captions(folder_source(tmp_path / "files")) == ["a red circle"]
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "a.png").write_bytes(data.png(0))
    row = json.dumps({"file_name": "a.png", "text": "ein Kreis \u2028 rot"}, ensure_ascii=False)
    (listed / "metadata.jsonl").write_text(row + "\r\n" + row + "\n", "utf-8-sig", newline="")
    assert captions(folder_source(listed)) == ["ein Kreis rot"] * 2
    (tmp_path / "prompts.txt").write_text("one\ntwo\n", "utf-8-sig")
    assert prompts_source(tmp_path / "prompts.txt").shards == ("one", "two")
    for ending, text in ((".txt", "\ufeffa star"), (".json", '\ufeff{"caption": "\ufeffa star"}')):
        files = {"a.png": data.png(0), "a" + ending: text.encode()}
        assert captions(tar_source(str(data.tar(tmp_path / f"s{ending}.tar", files)))) == ["a star"]
    with pytest.raises(ValueError, match="missing or empty"):
        checked(b"x", "\ufeff  ")


def test_a_caption_that_is_no_utf_8_is_damaged_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(data.png(0))
    good = b'{"file_name": "a.png", "text": "a ring"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(good + good.replace(b"ring", b"r\xefng") + good)
    first, second, third = (
        next(iter(source.rows(shard, 0)))
        for source in [folder_source(tmp_path)]
        for shard in source.shards
    )
    assert first.read()[1] == third.read()[1] == "a ring"
    with pytest.raises(ValueError, match="utf-8"):
        second.read()
