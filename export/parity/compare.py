"""Two ways to compute the same tensors, compared by polygraphy: torch first, then a backend."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One tensor, compared. True where the relative error is within `limit`."""

    place: str
    tensor: str
    relative_error: float
    cosine: float
    max_abs: float
    limit: float

    def __bool__(self) -> bool:
        return self.relative_error <= self.limit  # a NaN is not

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity and no not-a-number: 1e30 stands for both."""
        numbers = {
            name: value if np.isfinite(value) else 1e30
            for name, value in asdict(self).items()
            if isinstance(value, float)
        }
        return {"place": self.place, "tensor": self.tensor, **numbers, "passed": bool(self)}


def compare(
    place: str,
    feed: Arrays,
    torch: Callable[[Arrays], Arrays] | Arrays,
    backend: Callable[[Arrays], Arrays],
    *,
    name: str,
    limit: float,
) -> list[Row]:
    """Give both the same inputs; a Row per output. `torch` may be outputs recorded earlier.

    Outputs are paired by name; an output that one side lacks is a ValueError.
    """
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    recorded = torch
    first = recorded if callable(recorded) else lambda _: recorded
    runners = [make_runner("torch", first, feed), make_runner(name, backend, feed)]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[dict(feed)])
        rows: list[Row] = []

        def measure_all(one: Any, other: Any) -> OrderedDict[str, Row]:
            names, found = list(one), list(other)
            if sorted(names) != sorted(found):
                raise ValueError(
                    f"{place} gives {', '.join(sorted(found))} on {name}, expected"
                    f" {', '.join(sorted(names))} as in torch; export the bundle again."
                )
            pairs = OrderedDict(
                (tensor, measure(place, tensor, one[tensor], other[tensor], limit))
                for tensor in names
            )
            rows.extend(pairs.values())
            return pairs

        Comparator.compare_accuracy(results, compare_func=measure_all)
    return rows


def measure(place: str, tensor: str, expected: Any, found: Any, limit: float) -> Row:
    """|found - expected| / |expected| in the 2-norm, cosine, largest difference; in float64."""
    a, b = (np.asarray(value, np.float64).ravel() for value in (expected, found))
    if np.shape(expected) != np.shape(found):
        raise ValueError(
            f"{place} gives {tensor} of shape {list(np.shape(found))}, expected"
            f" {list(np.shape(expected))} as in torch; export the bundle again."
        )
    size = float(np.linalg.norm(a))
    error = float(np.linalg.norm(b - a))
    product = size * float(np.linalg.norm(b))
    cosine = float(a @ b) / product if product else float(size == np.linalg.norm(b))
    relative = error / size if size else (0.0 if error == 0 else float("inf"))
    return Row(place, tensor, relative, cosine, float(np.abs(b - a).max(initial=0)), limit)


def psnr(expected: np.ndarray, found: np.ndarray) -> float:
    """Peak signal to noise ratio in dB of images 0 to 1; at most 200, where they are equal."""
    error = float(np.mean((expected.astype(np.float64) - found.astype(np.float64)) ** 2))
    return 200.0 if error < 1e-20 else -10 * float(np.log10(error))


def make_runner(name: str, function: Callable[[Arrays], Arrays], feed: Arrays) -> Any:
    """A polygraphy runner around a function from dict to dict (its own torch runner needs CUDA)."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class FunctionRunner(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor, value in feed.items():
                metadata.add(tensor, value.dtype, value.shape)
            return metadata

        def infer_impl(self, feed_dict: Arrays) -> Any:
            start = time.perf_counter()
            outputs = OrderedDict(function(feed_dict))
            self.inference_time = time.perf_counter() - start
            return outputs

    return FunctionRunner(name=name)
