"""Small sources of training data for tests: real files of every kind that d2m convert reads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = [
    f"a photo of {n} {colour} circle"
    for n in ("one", "two", "three")
    for colour in ("red", "green", "blue", "yellow")
]


def png(index: int, side: int = 24) -> bytes:
    """The file of a picture that no other index has."""
    noise = np.random.default_rng(index).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def folder(path: Path, count: int = 12) -> Path:
    """COUNT pictures with a .txt beside each."""
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f"{i:03d}.png").write_bytes(png(i))
        (path / f"{i:03d}.txt").write_text(CAPTIONS[i] + "\n")
    return path


def listed(path: Path, count: int = 12) -> Path:
    """The same with a metadata.jsonl."""
    (path / "pictures").mkdir(parents=True)
    rows = []
    for i in range(count):
        (path / f"pictures/{i}.png").write_bytes(png(i))
        rows.append(json.dumps({"file_name": f"pictures/{i}.png", "text": CAPTIONS[i]}))
    (path / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return path


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def shards(path: Path, count: int = 12, each: int = 5) -> str:
    """Tar shards of EACH samples, captions in .txt and .json by turns; their brace pattern."""
    last = (count - 1) // each
    for shard in range(last + 1):
        files = {}
        for i in range(shard * each, min(count, (shard + 1) * each)):
            files[f"{i:03d}.png"] = png(i)
            if i % 2:
                files[f"{i:03d}.json"] = json.dumps({"caption": CAPTIONS[i], "width": 32}).encode()
            else:
                files[f"{i:03d}.txt"] = CAPTIONS[i].encode()
        tar(path / f"train-{shard:03d}.tar", files)
    return str(path / f"train-{{000..{last:03d}}}.tar")


def parquet(path: Path, count: int = 12, each: int = 5) -> Path:
    """A dataset as the hub holds it: parquet files with an Image column and a text."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (path / "data").mkdir(parents=True)
    last = (count - 1) // each
    datasets.disable_progress_bars()
    for shard in range(last + 1):
        rows = range(shard * each, min(count, (shard + 1) * each))
        pictures = [{"bytes": png(i), "path": None} for i in rows]
        made = {"image": pictures, "text": [CAPTIONS[i] for i in rows]}
        name = f"train-{shard:05d}-of-{last + 1:05d}.parquet"
        datasets.Dataset.from_dict(made, features=features).to_parquet(path / "data" / name)
    return path


def prompts(path: Path, count: int = 12) -> Path:
    path.write_text("\n".join(CAPTIONS[:count]) + "\n")
    return path
