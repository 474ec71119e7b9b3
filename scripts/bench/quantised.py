"""What a quantised format costs and saves on the shapes world: score, errors, bytes, time.

    python -m scripts.bench.quantised dense=BUNDLE sparse=runtime/default [--n 200] [--formats ...]

Every bundle (float32, not quantised) is quantised to each format and generates the same held-out
captions from the same noise on one thread; the formats take turns with every batch, and ratios are
medians over batches. A block's error is that of its outputs against the unquantised block on the
same inputs. fp8 and nvfp4 round as GPUs do and multiply in float32 on a CPU:
their scores count, their times do not.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.ort.blocks import Blocks
from scripts.figures import machine, options, ratios, write_figures

FORMATS = ("int8", "int4", "fp8", "nvfp4")


class Turns:
    """Bundles by format, which take turns with every batch; keeps what images took."""

    def __init__(self, bundles: Mapping[str, Path], batch: int) -> None:
        from runtime.pipeline import Pipeline

        self.pipelines = {
            form: Pipeline(path, "ort", threads=1, max_batch=batch)
            for form, path in bundles.items()
        }
        self.seconds: dict[str, list[float]] = {form: [] for form in bundles}
        self.images: dict[tuple[str, tuple[int, ...]], Any] = {}
        for pipeline in self.pipelines.values():  # what opens and grows does so now
            pipeline("", steps=1)

    def by(self, form: str) -> Callable[[Sequence[str], Sequence[int]], Any]:
        """A format as a suite's evaluation calls it."""

        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
            key = tuple(seeds)
            if (form, key) not in self.images:
                for each, pipeline in self.pipelines.items():
                    began = time.process_time()
                    images: Any = pipeline(list(prompts), seed=list(seeds))
                    self.seconds[each].append((time.process_time() - began) / len(images))
                    self.images[each, key] = images
            return self.images.pop((form, key))

        return generate


def block_errors(made: Turns, plain: str, form: str) -> dict[str, float]:
    """The median and the largest relative error of a block's outputs, on unquantised inputs.

    Of an image's first, middle and last step. Every block of a group runs on what enters the group.
    """
    steps: list[dict[str, np.ndarray]] = []
    pipeline = made.pipelines[plain]
    pipeline.step_hook = lambda inputs, top_k, kappa: steps.append(dict(inputs))
    pipeline("a photo of a red circle and a white square")
    pipeline.step_hook = None
    one, other = (Blocks(made.pipelines[name].bundle, "transformer", 1) for name in (plain, form))
    closing = {row["calls"][-1] for row in one.component.get("groups", {}).values()}
    inside = {call for row in one.component.get("groups", {}).values() for call in row["calls"]}
    errors = []
    for feed in (steps[0], steps[len(steps) // 2], steps[-1]):
        env = dict(feed)
        calls = zip(one.component["program"], other.component["program"], strict=True)
        for index, (call, twin) in enumerate(calls):
            names = one.component["types"][call["type"]]["inputs"]
            inputs = {name: env[name] for name in names}
            exact = one.block(call["type"], call["prefix"], inputs)
            found = other.block(twin["type"], twin["prefix"], inputs)
            if call["prefix"]:
                errors += [
                    float(np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name]))
                    for name in exact
                ]
            if index not in inside or index in closing:
                env |= exact
    return {
        "block_error_median": round(statistics.median(errors), 5),
        "block_error_largest": round(max(errors), 5),
    }


def main() -> None:
    """Parse, export, generate, judge, print, write."""
    parser = options(__doc__, "shapes/quantised.json")
    parser.add_argument("bundles", nargs="+", help="such as sparse=runtime/default")
    parser.add_argument("--n", type=int, default=200, help="captions")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS))
    arguments = parser.parse_args()
    from calib.score.pairs import paired
    from calib.suites import suite_named
    from export.requantise import quantise_bundle

    suite, rows = suite_named("shapes"), []
    with tempfile.TemporaryDirectory() as work:
        for name, _, path in (text.partition("=") for text in arguments.bundles):
            bundles = {"none": Path(path)}
            for form in arguments.formats:
                bundles[form] = Path(work, f"{name}-{form}")
                quantise_bundle(path, bundles[form], quant=form)
            made, plain = Turns(bundles, arguments.batch), "none"
            pixels = int(made.pipelines[plain].manifest["defaults"]["height"])
            world = suite.world(pixels, {})
            judged: dict[str, Any] = {}
            for form, bundle in bundles.items():
                score, judged[form] = suite.evaluate(
                    made.by(form), arguments.n, 0, world, batch=arguments.batch
                )
                rows.append(
                    {
                        "model": name,
                        "format": form,
                        "transformer_bytes": (bundle / "transformer.safetensors").stat().st_size,
                        "score": score["overall"],
                        "pairs": paired(judged[plain], judged[form]),
                        "cpu_s_an_image": round(statistics.median(made.seconds[form]), 4),
                        **ratios(made.seconds[plain], made.seconds[form]),
                        **(block_errors(made, plain, form) if form != plain else {}),
                    }
                )
                print(rows[-1], flush=True)
    facts = machine(1, "onnxruntime", "torch")
    write_figures(
        arguments.json, "scripts.bench.quantised", {**facts, "n": arguments.n, "rows": rows}
    )


if __name__ == "__main__":
    main()
