"""A bundle behind NVIDIA Triton Inference Server: requests of its Python backend in, images out.

What `d2m export --triton-repo` writes as model.py hands everything to `Model`. The server gathers
requests (dynamic batching) and hands them over as a list; those with the same settings are
generated together where no bit of an image depends on the others (batch_invariance.py), else one by
one. `pb` is the module triton_python_backend_utils, which exists inside the server only.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.image import to_png
from runtime.images.given import example_images
from runtime.pipeline import Pipeline
from runtime.request import Request, check_request
from runtime.sampling import Cancelled
from runtime.serve.batch import batch_call, batch_key
from runtime.serve.batch_invariance import MinBatches

log = logging.getLogger("runtime")
# Input -> the argument of a pipeline, and what one value of it is.
SETTINGS: dict[str, Callable[[Any], Any]] = {
    "steps": int, "guidance": float, "height": int, "width": int,
}  # fmt: skip
KNOBS = ("top_k", "kappa")  # a number, or one for every step
LISTS = ("sigmas",)  # one for every step


@dataclass
class TritonRequest:
    """One request of the server that can be generated; `index`: its place in the list."""

    index: int
    arguments: Request
    cancelled: Callable[[], bool]
    outputs: tuple[str, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """Requests of the same key may share a batch."""
        return batch_key(self.arguments)


class Model:
    """One instance of the model: a process with one pipeline."""

    def __init__(self, pb: Any, args: Mapping[str, str], folder: str | Path) -> None:
        """`args`: what the server gives to `initialize`; `folder`: that of model.py.

        Raises what runtime.load raises; the server shows the sentence and does not load the model.
        """
        self.pb = pb
        config = json.loads(args["model_config"])
        rows = config.get("parameters", {})
        given = {name: row["string_value"] for name, row in rows.items()}
        if args.get("model_instance_kind") == "GPU":
            use_device(int(args["model_instance_device_id"]))
        bundle = Path(folder, given.get("d2m_bundle") or "bundle")  # an absolute path stays itself
        self.pipeline = Pipeline(
            bundle,
            given.get("backend") or "auto",
            threads=int(given["threads"]) if given.get("threads") else None,
            max_batch=max(1, int(config.get("max_batch_size", 0))),
        )
        defaults = self.pipeline.manifest["defaults"]
        self.max_steps = int(given.get("max_steps") or 100)
        pixels = 4 * defaults["height"] * defaults["width"]
        self.max_pixels = int(given.get("max_pixels") or pixels)
        self.pipeline.warm()
        self.min_batches = MinBatches(self.pipeline)
        given = example_images(self.pipeline.manifest)
        self.min_batches.of(check_request(self.pipeline.manifest, "", steps=1, **given))
        # What the first call alone has to do is done before "ready".
        self.pipeline("", steps=1, **given)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for every request, in their order. Nothing that one asks for fails another."""
        answers: dict[int, Any] = {}
        by_key: dict[tuple[Any, ...], list[TritonRequest]] = {}
        for index, request in enumerate(requests):
            try:
                wanted = self.read(index, request)
            except ValueError as error:
                answers[index] = self.refusal(str(error), "INVALID_ARG")
                continue
            by_key.setdefault(wanted.key, []).append(wanted)
        for same in by_key.values():
            min_batch = self.min_batches.of(same[0].arguments)
            for batch in batches(same, self.pipeline.max_batch if min_batch else 0):
                answers |= self.generate(batch, min_batch or 0)
        return [answers[index] for index in range(len(requests))]

    def read(self, index: int, request: Any) -> TritonRequest:
        """A request's tensors as arguments; ValueError with one sentence where they are wrong."""
        prompts = [text(value, "prompt") for value in self.values(request, "prompt")]
        if not prompts:
            raise ValueError("the input 'prompt' is missing, expected a text for every image.")
        seeds = [int(value) for value in self.values(request, "seed")] or [0] * len(prompts)
        call: dict[str, Any] = {}
        for name, kind in SETTINGS.items():
            values = sorted({kind(value) for value in self.values(request, name)})
            if len(values) > 1:
                raise ValueError(f"{name} is {values} in one request, expected one value for all.")
            if values:
                call[name] = values[0]
        if negative := self.values(request, "negative_prompt"):
            call["negative"] = [text(value, "negative prompt") for value in negative]
        for name in (*KNOBS, *LISTS):
            rows = self.rows(request, name)
            if len({tuple(row) for row in rows}) > 1:
                raise ValueError(f"{name} differs in one request, expected one value for all.")
            if rows and rows[0]:
                one = len(rows[0]) == 1 and name in KNOBS
                call[name] = rows[0][0] if one else rows[0]
        checked = check_request(self.pipeline.manifest, prompts, seed=seeds, **call)
        if len(checked.top_k) > self.max_steps:
            raise ValueError(f"steps is {len(checked.top_k)}, expected at most {self.max_steps}.")
        if checked.height * checked.width > self.max_pixels:
            raise ValueError(
                f"the image is {checked.width} x {checked.height}, expected at most"
                f" {self.max_pixels} pixels."
            )
        outputs = tuple(request.requested_output_names())
        return TritonRequest(index, checked, request.is_cancelled, outputs)

    def values(self, request: Any, name: str) -> list[Any]:
        """An input's values, one an image; none where it is not given."""
        return [value for row in self.rows(request, name) for value in row]

    def rows(self, request: Any, name: str) -> list[list[Any]]:
        """An input [images, n] as lists."""
        tensor = self.pb.get_input_tensor_by_name(request, name)
        if tensor is None:
            return []
        array = tensor.as_numpy()
        if array.dtype != object and not np.isfinite(array).all():
            raise ValueError(f"{name} is {array.ravel()[0]}, expected finite numbers.")
        rows: list[list[Any]] = array.reshape(len(array), -1).tolist()
        return rows

    def generate(self, batch: list[TritonRequest], min_batch: int) -> dict[int, Any]:
        """Responses of requests that are generated together; where that fails, each on its own.

        `min_batch`: of runtime.serve.batch_invariance, 0 where there is none.
        """
        gone = [wanted for wanted in batch if wanted.cancelled()]
        batch = [wanted for wanted in batch if wanted not in gone]
        cancelled = {wanted.index: self.refusal("cancelled", "CANCELLED") for wanted in gone}
        if not batch:
            return cancelled
        try:
            images = self.images(batch, min_batch)
        except Cancelled as error:
            return cancelled | {a.index: self.refusal(str(error), "CANCELLED") for a in batch}
        except Exception as error:  # the server goes on, and every client gets an answer
            log.exception("a batch of %d requests failed", len(batch))
            if len(batch) == 1:
                failed = self.refusal(f"{type(error).__name__}: {error}", "INTERNAL")
                return cancelled | {batch[0].index: failed}
            for wanted in batch:
                cancelled |= self.generate([wanted], min_batch)
            return cancelled
        for wanted in batch:
            count = len(wanted.arguments.prompts)
            cancelled[wanted.index] = self.response(images[:count], wanted.outputs)
            images = images[count:]
        return cancelled

    def images(self, batch: list[TritonRequest], min_batch: int) -> list[Any]:
        """PIL images of all requests of a batch, in order."""
        pipeline = copy.copy(self.pipeline)  # shares bundle, sessions and tokenizers
        pipeline.min_batch = min(min_batch, pipeline.max_batch)
        images = pipeline(
            **batch_call([wanted.arguments for wanted in batch]),
            cancel=lambda: all(wanted.cancelled() for wanted in batch),
        )
        assert isinstance(images, list)
        return images

    def response(self, images: list[Any], outputs: tuple[str, ...]) -> Any:
        """The requested outputs: png [images, 1], image [images, height, width, 3]."""
        tensors = []
        if "png" in outputs or not outputs:
            pngs = np.array([[to_png(image)] for image in images], object)
            tensors.append(self.pb.Tensor("png", pngs))
        if "image" in outputs or not outputs:
            pixels = np.stack([np.asarray(image, np.uint8) for image in images])
            tensors.append(self.pb.Tensor("image", pixels))
        return self.pb.InferenceResponse(output_tensors=tensors)

    def refusal(self, sentence: str, code: str) -> Any:
        """A response that is an error."""
        error = self.pb.TritonError(sentence, getattr(self.pb.TritonError, code))
        return self.pb.InferenceResponse(output_tensors=[], error=error)


def batches(wanted: list[TritonRequest], room: int) -> list[list[TritonRequest]]:
    """Requests in order, as many together as have `room` images; each alone where it is 0."""
    found: list[list[TritonRequest]] = []
    images = 0
    for each in wanted:
        size = len(each.arguments.prompts)
        if not found or images + size > room:
            found.append([])
            images = 0
        found[-1].append(each)
        images += size
    return found


def text(value: Any, name: str) -> str:
    """A string of the server, which are bytes; ValueError where they are no UTF-8."""
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode("utf-8")
    except (UnicodeDecodeError, TypeError):
        raise ValueError(f"the {name} is {value!r:.80}, expected text in UTF-8.") from None


def use_device(number: int) -> None:
    """Make the GPU of this instance the current one, before anything is opened on it.

    The server tells every instance its GPU and leaves it to the model to use it.
    """
    from runtime.cuda.device import bindings

    cuda = bindings()
    (error,) = cuda.cudaSetDevice(number)
    if int(error):
        raise OSError(
            f"GPU {number} cannot be used (CUDA error {int(error)}); expected one of the GPUs that"
            " this process sees: name others under gpus of the instance_group in config.pbtxt."
        )
