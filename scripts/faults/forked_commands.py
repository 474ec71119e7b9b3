"""convert, export and run on a tiny model, ready to be done again and again by forked children.

Two results of each export and run, "a" and "b", so that a mixture of both would be found out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

STEPS = 2  # of every stage
TOP_K = (2,)
STORAGE = {"a": "fp32", "b": "bf16"}  # what the two exports differ in
SEEDS = {"a": 1, "b": 2}
SIZE = 16  # pixels
Work = Callable[[], Any]


class Tools:
    """A dense pipeline, its conversion, two bundles; and the functions that make them again."""

    def __init__(self, root: Path, like: tuple[Path, Path] | None = None) -> None:
        """Make what the tries begin with below `root`.

        `like`: a sparse pipeline and its bundle, whose graphs spare the tracing.
        """
        import torch

        import d2m.model.sparse_transformer  # noqa: F401 - diffusers finds our class in a module that is imported
        from calib.measure.importance import neuron_importance
        from calib.shapes.batches import shapes_batches
        from calib.shapes.world import World
        from d2m.recipe import recipe as recipes
        from tests.tiny.pipeline import tiny_pipeline

        torch.set_num_threads(1)
        self.root = root
        self.dense = tiny_pipeline(root / "dense")
        sizes = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE}
        (self.dense / "defaults.json").write_text(json.dumps(sizes))
        preset = recipes.preset("L")
        stages = [dataclasses.replace(s, steps=STEPS, batch_size=2) for s in preset.stages]
        few = recipes.Calibration(batches=2, batch_size=2)
        self.recipe = dataclasses.replace(preset, calibration=few, stages=tuple(stages))
        self.importance = neuron_importance
        self.batches = lambda pipe, seed: shapes_batches(pipe, World(size=32), seed)
        self.sparse = like[0] if like else root / "sparse"
        if not like:
            self.convert(self.sparse)()
        self.trace(like)
        self.bundles = {which: root / f"bundle-{which}" for which in STORAGE}
        import onnxruntime  # noqa: F401 - imported once, by the parent

    def make_bundles(self) -> None:
        """In a child, as sessions of ONNX Runtime do not survive a fork."""
        for which, path in self.bundles.items():
            self.export(path, which)()

    def convert(self, out: Path, _: str = "a") -> Work:
        """Importance, surgery, distillation; a checkpoint after every step."""

        def work() -> Any:
            from d2m.convert.in_memory import Options, Report, convert

            options, report = Options(resume=True, save_seconds=0), Report(write=False)
            args = (self.dense, out, self.recipe, self.batches, self.importance)
            answer = convert(*args, options=options, report=report, log=lambda text: None)
            return answer["out"]

        return work

    def stream(self, out: Path, _: str = "a") -> Work:
        """The conversion that goes block by block from file to file."""

        def work() -> Any:
            from calib.measure.importance import importance_from_option
            from d2m.convert.streamed import convert_stream

            _, scores, label = importance_from_option("magnitude")
            assert scores is not None
            args = (self.dense, out, self.recipe, scores, label)
            return convert_stream(*args, resume=True, log=lambda text: None)["out"]

        return work

    def export(self, out: Path, which: str = "a") -> Work:
        """Everything but the tracing, which the parent has done."""

        def work() -> Any:
            from export.bundle import export_bundle

            return export_bundle(self.sparse, out, top_k=TOP_K, storage=STORAGE[which])["out"]

        return work

    def export_traced(self, out: Path, which: str = "a") -> Work:
        """The whole export, tracing too, in the child."""

        def work() -> Any:
            import export.checkpoint.pipeline

            export.checkpoint.pipeline.open_components = self.components  # type: ignore[assignment]
            return self.export(out, which)()

        return work

    def run(self, out: Path, which: str = "a") -> Work:
        """Open the bundle, generate one image, save it."""

        def work() -> Any:
            import runtime
            from runtime.image import save

            pipeline = runtime.load(self.bundles["a"], "ort")
            image: Any = pipeline("a red circle", seed=SEEDS[which], steps=1)
            return str(save(image, out))

        return work

    def trace(self, like: tuple[Path, Path] | None) -> None:
        """Trace every component once; from now on exports of this process take these graphs."""
        import torch

        import export.checkpoint.pipeline

        self.components = export.checkpoint.pipeline.open_components
        parts = self.components(self.sparse, True, list(TOP_K), None)
        programs = {
            part.name: stored(part, like[1]) if like else part.trace(torch.float32)
            for part in parts
        }

        def traced(*args: Any) -> Any:
            parts = self.components(*args)
            for part in parts:
                part.trace = partial(_known, programs[part.name])
            return parts

        vars(export.checkpoint.pipeline)["open_components"] = traced


def _known(program: Any, dtype: Any) -> Any:
    return program


def stored(part: Any, folder: Path) -> Any:
    """A component's program, its graphs read from a bundle that was exported from it."""
    import onnx
    import torch

    from export.graph.program import BlockType, Program
    from export.graph.trace import Spec
    from runtime.bundle.directory import open_bundle

    bundle = open_bundle(folder)
    row, arrays = bundle.component(part.name), bundle.weights(part.name)

    def specs(rows: dict[str, Any]) -> dict[str, Spec]:
        return {
            name: Spec(getattr(torch, each["dtype"]), tuple(each["shape"]))
            for name, each in rows.items()
        }

    types = {}
    for name, kind in row["types"].items():
        prefix = next(call["prefix"] for call in row["program"] if call["type"] == name)
        linears = {
            local
            for local, weight in kind["weights"].items()
            if turned(part, prefix + local, arrays.array(prefix + local, weight["dtype"]))
        }
        read: Any = dict.fromkeys(kind["inputs"])
        written: Any = dict.fromkeys(kind["outputs"])
        graphs = {
            key: onnx.load(str(bundle.file(path)))
            for key, path in kind["graphs"].items()
            if key in ("", *map(str, TOP_K))
        }
        types[name] = BlockType(
            name, read, written, specs(kind["weights"]), frozenset(linears), graphs
        )
    calls = [(call["type"], call["prefix"]) for call in row["program"]]
    return Program(types, calls, specs(row["inputs"]), specs(row["outputs"]))


def turned(part: Any, name: str, array: Any) -> bool:
    """Whether a bundle holds a checkpoint's weight transposed."""
    import torch

    from export.checkpoint.weights import sources_of

    whole = torch.cat([part.get(source).detach() for source in sources_of(name)])
    return array.ndim == 2 and (array.shape != whole.shape or not (array == whole.numpy()).all())


def state_of(path: Path) -> str | None:
    """A file's or a directory's content as one hash: names and bytes; None where it is not."""
    if not os.path.lexists(path):
        return None
    digest = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for each in files:
        if each.is_file():
            digest.update(f"{each.relative_to(path)}\0{each.stat().st_size}\0".encode())
            digest.update(each.read_bytes())
    return digest.hexdigest()


def leftovers(place: Path) -> list[str]:
    """Temporary names of ours below a directory."""
    return sorted(
        str(path.relative_to(place))
        for path in place.rglob(".*")
        if path.suffix in (".tmp", ".old")
    )


def emptied(place: Path) -> Path:
    """The directory, with nothing in it."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place
