"""The emoji world's pictures: found, unpacked without trusting paths, and told how to get."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calib.emoji import art
from calib.emoji.__main__ import main
from calib.emoji.choice import catalogue, halved, name_of
from calib.emoji.world import World
from tests.tiny.emoji import make_art, name, picture, row


def entry(**more: object) -> art.Entry:
    values = {"name": "SLICE OF PIZZA", "short_names": ("pizza",), "category": "Food & Drink"}
    return art.Entry(**{**values, "age": (0, 6), "order": 1, "image": Path("x"), **more})


@pytest.mark.parametrize(
    "more, expected",
    [
        ({}, "pizza"),
        ({"short_names": ("cat2",), "name": "CAT"}, "cat"),  # a digit
        ({"short_names": ("a",), "name": "NEGATIVE SQUARED A"}, "negative squared a"),
        ({"short_names": ("sweet_potato", "yam")}, "yam"),  # the shortest
        ({"short_names": ("flag-fr", "fr"), "name": "France Flag", "category": "Flags"},
         "france flag"),
        ({"short_names": ("x_o-y",)}, "x o y"),
        ({"short_names": ("arrow_left",)}, None),  # a caption's own word
        ({"short_names": ("face_with_two_big_ears",)}, None),  # too many
        ({"short_names": ("u7121",), "name": "SQUARED 1"}, None),
    ],
)  # fmt: skip
def test_names(more, expected):
    assert name_of(entry(**more)) == expected


def test_the_oldest_come_first_and_look_alikes_and_namesakes_stay_out(tmp_path):
    folder = make_art(tmp_path / "art", 12)
    rows = [row(i) for i in range(12)]
    rows[4] |= {key: rows[5][key] for key in ("name", "short_names")}  # namesakes: neither
    rows[6]["category"] = "Component"
    rows.append(row(99, image=rows[1]["image"]))  # a double
    rows.append(row(98, image="1ffff.png"))  # without a picture
    (folder / "emoji.json").write_text(json.dumps(rows))
    found = catalogue(folder, 100)
    names = [one.name for one in found.emoji]
    assert names == [name(i) for i in (1, 3, 7, 9, 11, 0, 2, 8, 10)]
    assert (found.large[0] == np.asarray(picture(1))).all()
    assert found.small.shape == (9, 32, 32, 4)
    assert catalogue(folder, 3).emoji == found.emoji[:3]


def test_halved_weighs_colours_by_cover():
    pixels = np.zeros((1, 2, 2, 4), np.uint8)
    pixels[0, 0, 0] = 200, 100, 0, 255
    pixels[0, 1, 1] = 50, 10, 90, 0  # not seen
    assert halved(pixels).tolist() == [[[[200, 100, 0, 64]]]]


def archive(path: Path, members: dict[str, bytes | str]) -> str:
    """A .tgz of regular files (bytes) and symbolic links (text), and its SHA-256."""
    import hashlib

    with tarfile.open(path, "w:gz") as file:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def test_unpacking_takes_what_it_knows_by_name_and_nothing_else(tmp_path):
    head = "package/img/google/64/"
    members = {
        "package/emoji.json": json.dumps([row(i) for i in range(4)]).encode(),
        **{f"{head}1f00{i}.png": png(i) for i in range(4)},
        f"{head}../../../../../escaped.png": png(1),
        f"{head}/../1f009.png": png(1),
        "/1f00a.png": png(1),
        f"{head}1f00b.png": "../../../../../../outside",
        "package/img/google/128/1f00c.png": png(1),
        f"{head}readme.html": b"no",
    }
    tgz, folder = tmp_path / "art.tgz", tmp_path / "deep" / "art"
    outside = tmp_path / "outside"
    art.unpack(tgz, folder, archive(tgz, members))
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    expected = {f"deep/art/img/google/64/1f00{i}.png" for i in range(4)}
    assert files == expected | {"deep/art/emoji.json", "art.tgz"} and not outside.exists()
    assert len(World(folder=folder).names) == 4


def test_another_file_is_refused_by_its_hash(tmp_path):
    tgz = tmp_path / "art.tgz"
    archive(tgz, {"package/emoji.json": b"[]"})
    with pytest.raises(ValueError, match="SHA-256 is .* expected fb5fd131"):
        art.unpack(tgz, tmp_path / "art")
    assert not (tmp_path / "art").exists()


def test_where_the_pictures_are_not_at_hand_it_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv(art.VARIABLE, str(tmp_path / "nowhere"))
    words = r"are not in .*nowhere; get them with `python -m calib.emoji --get` \(npm, 74 MB\)"
    with pytest.raises(FileNotFoundError, match=words):
        _ = World().names
    with pytest.raises(SystemExit, match=words):
        main([])


@pytest.mark.parametrize("text", ["{", "[{}]", "3"])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "emoji.json").write_text(text)
    with pytest.raises(ValueError, match="emoji.json is not as emoji-datasource-google's"):
        art.read_entries(tmp_path)


def test_a_picture_of_another_size_is_named(tmp_path):
    folder = make_art(tmp_path / "art", 3)
    path = folder / "img/google/64/1f001.png"
    Image.new("RGBA", (32, 32)).save(path)
    with pytest.raises(ValueError, match="1f001.png has 32 x 32 pixels, expected 64"):
        _ = World(folder=folder).names


def test_the_command_lists_the_world(tmp_path, capsys):
    folder = make_art(tmp_path / "art", 9)
    main(["--folder", str(folder)])
    assert capsys.readouterr().out.splitlines()[0] == f"{folder}: 9 emoji"


@pytest.mark.parametrize("npm", [None, "#!/bin/sh\necho no such package >&2\nexit 3\n"])
def test_npm_that_is_missing_or_fails_is_one_sentence(tmp_path, npm):
    tools = tmp_path / "tools"
    tools.mkdir()
    if npm:
        (tools / "npm").write_text(npm)
        (tools / "npm").chmod(0o755)
    found = subprocess.run(
        [sys.executable, "-m", "calib.emoji", "--get", "--folder", tmp_path / "art"],
        env={"PATH": f"{tools}:/bin" if npm else str(tools)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    words = "failed: no such package" if npm else "npm is not installed"
    assert found.returncode == 1 and words in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
