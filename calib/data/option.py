"""What `--data` means: a world of our own, prompts alone, or pictures from wherever they lie.

Every source ends in one plain function: (pipeline, seed) -> ((step, batch size) -> batch), where a
batch depends on nothing but its arguments. So a run that was killed goes on with the same batches.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.data.encoding_cache import read_lengths, write_lengths
from calib.data.folder import folder_source, prompts_source
from calib.data.samples import Unreadable, feed
from calib.data.shuffle import order
from calib.data.source import UNREADABLE, Source
from calib.shapes.batches import Batches
from calib.suites import NAMES, suite_named
from d2m.families import family_of, family_of_pipeline, pairs_for
from d2m.families.generation_defaults import generation_defaults
from runtime.files.checked_json import read_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

SHAPES = "shapes"


@dataclass(frozen=True)
class Data:
    """What a conversion needs of its data.

    batches: (pipeline, seed) -> batches; label: tells it from other data on a resume, None for
    shapes; prompts(count): captions for the report; categories: what a batch's `category` counts;
    facts(): the source and the number of samples left out; kind: one of `family.SOURCES` or
    PAIRS.
    """

    batches: Callable[[DiffusionPipeline, int], Batches]
    label: str | None
    prompts: Callable[[int], list[str]]
    categories: tuple[str, ...]
    facts: Callable[[], dict[str, Any]]
    kind: str = SHAPES


def open_data(
    how: str,
    settings: Callable[[], Mapping[str, Any]],
    *,
    cache: str | os.PathLike[str] | None = None,
    size: int | None = None,
    window: int = 1000,
    skip: int = 100,
    columns: str | None = None,
    log: Callable[[str], None] = print,
) -> Data:
    """Open the data that `--data HOW` names.

    Args:
        how: a name of calib.suites.NAMES, a file of prompts (.txt), a folder of pictures, .tar
            shards (path, folder, glob or brace pattern), or a dataset of the datasets library (path
            or name on the hub).
        settings: () -> `d2m.families.generation_defaults.generation_defaults` of the dense
            pipeline, by which pictures are cut and trajectories made; called when the pipeline is
            there.
        size: height and width in pixels, in place of those.
        cache: folder for encodings and trajectories; None keeps none.
        window: samples of a shard that are mixed. skip: unreadable samples before the run stops.
        columns: "IMAGE,CAPTION", or "BEFORE,AFTER,INSTRUCTION" of a dataset, in place of those
            found by their names.

    Raises FileNotFoundError, ImportError or ValueError, in one sentence, if there is no such data.
    """
    if window < 1:
        raise ValueError(f"--shuffle is {window}, expected a number of samples from 1 on")
    folder = None if cache is None else Path(cache)
    if size is not None and size < 1:
        raise ValueError(f"--size is {size}, expected pixels such as 512")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"--cache is {str(cache)!r}, a file; expected a folder")
    if how in NAMES:
        for option, value in (("--cache", folder), ("--columns", columns), ("--size", size)):
            if value is not None:
                raise ValueError(
                    f"{option} is {str(value)!r}, but {how} are made at the pipeline's own "
                    "size; leave it out"
                )
        world = suite_named(how)
        label = None if how == SHAPES else how
        return Data(world.batches, label, world.prompts, world.categories, dict, how)
    source = open_source(how, _names(columns))
    # One count for the whole conversion: calibration and training meet the same damaged samples.
    unreadable = Unreadable(source.name, skip, log)

    def batches(pipe: DiffusionPipeline, seed: int) -> Batches:
        values = {**settings()} | ({"height": size, "width": size} if size else {})
        return source_batches(
            pipe, source, seed, values, unreadable, cache=folder, window=window, log=log
        )

    def prompts(count: int) -> list[str]:
        found: list[str] = []
        for _, sample in islice(order(source, 0, 1, {}), 2 * count):
            try:
                found.append(sample.read()[1])
            except UNREADABLE:  # training counts them
                continue
        return list(dict.fromkeys(found))[:count]

    def facts() -> dict[str, Any]:
        return {"source": source.name, "left_out": len(unreadable.reasons)}

    label = f"{source.digest}, {size or 'own'} pixels, windows of {window}"
    kind = "pairs" if source.pairs else "pictures" if source.pictures else "prompts"
    return Data(batches, label, prompts, (), facts, kind)


CURES = {
    "shapes": "shapes, for a pipeline that generates 32 to 256 pixels",
    "emoji": "emoji, for one that generates 64 pixels",
    "pictures": "pictures and captions (a folder, .tar shards or a dataset)",
    "prompts": "a .txt file of prompts",
    "shapes-edit": "shapes-edit, for one that edits shapes",
    "pairs": "pictures before and after with instructions (a folder, .tar shards or a dataset)",
}


def check_data(dense: str | os.PathLike[str], data: Data) -> None:
    """ValueError, with the cure, where the pipeline's family cannot learn from such data.

    Reads JSON alone; a hub id that is not fetched yet, and what is no pipeline, are left to the
    conversion to judge.
    """
    root = Path(dense)
    if not (root / "model_index.json").is_file():
        return
    try:
        family = family_of(root)
    except ValueError:
        return
    edits = pairs_for(root)
    words = {kind: CURES[kind] for kind in edits or family.data.sources}
    if data.kind not in words:
        name = read_json(root / "model_index.json")["_class_name"]
        title = f"{name} (it edits images)" if edits else family.names.title
        raise ValueError(
            f"--data names {data.kind}, which {title} cannot learn from; expected "
            f"{' or '.join(words.values())} as --data"
        )
    if data.kind not in NAMES:
        return
    size = world_size(root)
    try:
        suite_named(data.kind).world(size, {})
    except ValueError as error:
        more = [text for kind, text in words.items() if kind != data.kind]
        raise ValueError(
            f"--data is {data.kind}, but {root} generates {size} pixels, which no world of "
            f"{data.kind} has ({error}); expected {' or '.join(more)} as --data"
        ) from error


def world_size(root: Path) -> int:
    """The pixels a pipeline directory learns a world at: its VAE's size, as `world_of` takes it.

    Where its VAE names none, the size it generates.
    """
    try:
        found = read_json(root / "vae" / "config.json").get("sample_size")
    except (OSError, ValueError, AttributeError):
        found = None
    return found if isinstance(found, int) else int(generation_defaults(root)["height"])


def open_source(how: str, columns: tuple[str, ...] | None = None) -> Source:
    """The source that a path, pattern or name means; errors as `open_data`."""
    path = Path(how)
    if path.is_file() and path.suffix == ".txt":
        return prompts_source(path)
    tars = ".tar" in path.name or (path.is_dir() and any(path.glob("*.tar")))
    if tars or (path.is_dir() and not _dataset_in(path)):
        if columns is not None and len(columns) == 3:
            raise ValueError(
                f"--columns names three columns, but {how} is no dataset; its pairs are found by "
                "their names, NAME.before.png and NAME.after.png: leave --columns out"
            )
        two = (columns[0], columns[1]) if columns else None
        if not tars:
            return folder_source(path, two)
        from calib.data.webdataset import tar_source

        return tar_source(how, two)
    # `pictures/hous` next to a folder `pictures` is a mistyped path, nothing to ask the hub for.
    near = path.parent != Path() and path.parent.exists()
    if not path.is_dir() and (path.exists() or near or how.count("/") > 1 or how[:1] in ".~/"):
        raise FileNotFoundError(
            f"--data is {how!r}, which is not there or of no known kind; expected "
            f"{', '.join(NAMES)}, a .txt file of prompts, a folder of pictures, .tar shards, or a "
            "dataset's path or name."
        )
    from calib.data.hub import hub_source

    return hub_source(how, columns)


def _dataset_in(path: Path) -> bool:
    """Whether a folder holds files that the datasets library reads, rather than pictures."""
    endings = ("*.parquet", "*.arrow", "dataset_dict.json", "state.json")
    return any(next(path.rglob(ending), None) is not None for ending in endings)


def _names(columns: str | None) -> tuple[str, ...] | None:
    if columns is None:
        return None
    names = tuple(name.strip() for name in columns.split(","))
    if len(names) not in (2, 3) or not all(names):
        raise ValueError(
            f"--columns is {columns!r}, expected two names, IMAGE,CAPTION, or three of a dataset "
            "of edits: BEFORE,AFTER,INSTRUCTION"
        )
    return names


def source_batches(
    pipe: DiffusionPipeline,
    source: Source,
    seed: int,
    settings: Mapping[str, Any],
    unreadable: Unreadable,
    *,
    cache: Path | None = None,
    window: int = 1000,
    log: Callable[[str], None] = print,
) -> Batches:
    """A function (step, batch size) -> one batch of the source, encoded by `pipe`.

    The dict is that of `calib.shapes.batches.shapes_batches` without `category`; of prompts alone
    it has `noisy`, `time` and `guidance` besides (`calib.data.trajectories`). Step n of size B
    holds positions n B to n B + B - 1 of the order by `seed`. ValueError if the pipeline cannot
    take the size.
    """
    lengths = read_lengths(cache, source.digest)
    if source.single:
        lengths = dict.fromkeys(source.shards, 1)
    known = len(lengths)  # lengths found on the way are written for the next run
    height, width = settings["height"], settings["width"]
    if source.pictures:
        from calib.data.encodings import collate, image_encoder, text_encoder

        picture: Callable[[Any], dict[str, Tensor]]
        if source.pairs:
            from calib.data.pairs import pair_encoder

            picture = pair_encoder(pipe, height, width, cache, log)
        else:
            picture = image_encoder(pipe, height, width, cache, log)
        text = text_encoder(pipe, settings["max_sequence_length"], cache, log)
        dropped = caption_dropper(pipe, seed)

        def decode(epoch: int, data: Any, caption: str) -> dict[str, Tensor]:
            return picture(data) | text("" if dropped(epoch, caption) else caption)

        samples = feed(source, seed, window, lengths, unreadable, decode)

        def pictures(step: int, size: int) -> dict[str, Tensor]:
            return collate(pipe, samples(step * size, size), height, width)

        made: Batches = pictures
    else:
        from calib.data.trajectories import trajectory_batches, trajectory_decoder

        ways = trajectory_decoder(pipe, seed, settings, cache, log)
        prompts = feed(source, seed, window, lengths, unreadable, ways)
        made = trajectory_batches(pipe, prompts, settings)

    def batch(step: int, size: int) -> dict[str, Tensor]:
        nonlocal known
        answer = made(step, size)
        if len(lengths) > known:
            known = len(lengths)
            write_lengths(cache, source.digest, lengths)
        return answer

    return batch


def caption_dropper(pipe: DiffusionPipeline, seed: int) -> Callable[[int, str], bool]:
    """A function (epoch, caption) -> whether the model is to learn it as an empty one, a pure one.

    A share of `Data.unconditional` is: classifier-free guidance asks a model for both.
    """
    share = family_of_pipeline(pipe).data.unconditional_of(pipe)

    def dropped(epoch: int, caption: str) -> bool:
        return random.Random(f"{seed}/empty/{epoch}/{caption}").random() < share

    return dropped
