"""Datasets of the `datasets` library, streamed: by name on the Hugging Face hub, or by path.

A file of the dataset is a shard. Pictures come as the bytes of their files and are decoded by us,
so that one that is damaged is one sample less and not an error of a library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from calib.data.folder import CAPTIONS
from calib.data.source import Files, Sample, Source, checked, checked_pair
from d2m.plan.hub import reason_of
from runtime.files.extras import need

PICTURES = ("image", "jpg", "jpeg", "png", "webp", "picture", "img")


def hub_source(name: str, columns: tuple[str, ...] | None = None) -> Source:
    """The dataset's split "train", or its only one, as a source.

    columns: those of the picture and of the caption, or of the pictures before and after an edit
    and of its instruction; None: picture and caption, found by their types and names.
    FileNotFoundError, ImportError or ValueError, in one sentence, if it cannot be opened, the
    library is missing, or no such columns are there.
    """
    data = _opened(name)
    features: Mapping[str, Any] = data.features or next(iter(data), {})
    *pictures, caption = columns or _columns(name, features)
    for column in (*pictures, caption):
        if column not in features:
            raise ValueError(
                f"{name} has no column {column!r}; it has {', '.join(features)}: name two of them "
                "with --columns IMAGE,CAPTION."
            )
    import datasets

    for picture in pictures:
        if _is_image(features[picture]):
            data = data.cast_column(picture, datasets.Image(decode=False))
    data = data.select_columns([*pictures, caption])
    count = data.num_shards
    shards = tuple(f"{name} {i + 1} of {count}" for i in range(count))
    number = {shard: i for i, shard in enumerate(shards)}

    def rows(shard: str, first: int) -> Iterator[Sample]:
        part = data.shard(count, number[shard], contiguous=True)
        for row, values in enumerate(part.skip(first) if first else part, first):
            files = [values[picture] for picture in pictures]
            yield Sample(f"{shard}, row {row}", partial(_read, files, values[caption]))

    def length(shard: str) -> int:
        part = data.shard(count, number[shard], contiguous=True).select_columns([caption])
        return sum(1 for _ in part)

    return Source(name, shards, rows, length, pairs=len(pictures) > 1)


def _opened(name: str) -> Any:
    """The dataset, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            need("data", f"--data {name} needs the datasets library", error)
        ) from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    saved = (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file()
    try:
        found: Any = datasets.load_from_disk(name) if saved else None
        found = datasets.load_dataset(name, streaming=True) if found is None else found
    except Exception as error:  # of many kinds, by network, licence and release of the hub
        raise FileNotFoundError(
            f"--data {name} cannot be opened as a dataset ({reason_of(error)}); expected shapes, "
            "prompts.txt, a folder of pictures, .tar shards, or a dataset's path or name."
        ) from error
    if isinstance(found, Mapping):
        splits = list(found)
        if "train" not in splits and len(splits) != 1:
            raise ValueError(f"{name} has the splits {', '.join(splits)}; expected train or one.")
        found = found["train" if "train" in splits else splits[0]]
    if not hasattr(found, "num_shards") or isinstance(found, datasets.Dataset):
        found = found.to_iterable_dataset(num_shards=min(64, len(found)) or 1)
    return found


def _columns(name: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of picture and caption; ValueError says how to name them."""
    images = [column for column, kind in features.items() if _is_image(kind)]
    images += [column for column in PICTURES if column in features and column not in images]
    texts = [column for column in CAPTIONS if column in features]
    strings = [
        column
        for column, kind in features.items()
        if isinstance(kind, str) or getattr(kind, "dtype", None) == "string"
    ]
    texts = texts or (strings if len(strings) == 1 else [])
    if not images or not texts:
        what = "picture" if not images else "caption"
        raise ValueError(
            f"{name} has no column that is clearly the {what}; it has {', '.join(features)}: name "
            "two of them with --columns IMAGE,CAPTION."
        )
    return images[0], texts[0]


def _is_image(kind: Any) -> bool:
    return type(kind).__name__ == "Image"


def _read(values: Sequence[Any], caption: Any) -> tuple[Files, str]:
    """A sample: the bytes of its picture's file, or of both of an edit, and its caption."""
    first, *more = (_bytes(value) for value in values)
    return checked_pair(first, more[0], None, caption) if more else checked(first, caption)


def _bytes(value: Any) -> bytes:
    """A picture's file."""
    data = value
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if not data and value.get("path"):
            import fsspec  # of the datasets library: paths may lie in archives or far away

            with fsspec.open(value["path"], "rb") as file:
                data = file.read()
    if not isinstance(data, bytes):
        raise ValueError(f"the picture is a {type(value).__name__}, expected its file's bytes")
    return data
