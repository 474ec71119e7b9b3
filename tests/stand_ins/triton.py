"""What a Python model meets inside Triton Inference Server: its utility module, and who calls it.

A stand-in, since the server is a container of gigabytes. It is as strict as the server where that
is strict: types and shapes of tensors against config.pbtxt, strings as bytes in arrays of objects,
one response for every request, a batch no larger than max_batch_size.
"""

import importlib.util
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.stand_ins import pbtxt

NUMPY = {"TYPE_STRING": "O", "TYPE_INT64": "i8", "TYPE_INT32": "i4", "TYPE_FP32": "f4"}
NUMPY["TYPE_UINT8"] = "u1"


class Tensor:
    """pb_utils.Tensor."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        if not isinstance(array, np.ndarray):
            raise TypeError("Tensor takes a numpy array")
        if array.dtype == object and not all(isinstance(x, bytes) for x in array.ravel()):
            raise TypeError("strings are bytes in an array of objects")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    """pb_utils.TritonError."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS = range(7)
    CANCELLED = 7

    def __init__(self, message: str, code: int = 1) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    """pb_utils.InferenceResponse."""

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class InferenceRequest:
    """pb_utils.InferenceRequest, of the methods that a model calls."""

    def __init__(self, inputs: list[Tensor], outputs: list[str]) -> None:
        self._inputs, self._outputs = inputs, outputs
        self.cancel_after: int | None = None  # calls of is_cancelled that are still answered No

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def is_cancelled(self) -> bool:
        if self.cancel_after is None:
            return False
        self.cancel_after -= 1
        return self.cancel_after < 0


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    """pb_utils.get_input_tensor_by_name."""
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


class Server:
    """One instance of one model of a repository, called as the server calls it."""

    def __init__(self, model: Path, kind: str = "CPU", device: int = 0) -> None:
        self.config = pbtxt.parse((model / "config.pbtxt").read_text())
        pbtxt.check(self.config, model.name)
        parameters = {row["key"]: row["value"] for row in self.config["parameters"]}
        utils = types.ModuleType("triton_python_backend_utils")
        for thing in (Tensor, TritonError, InferenceResponse, InferenceRequest):
            setattr(utils, thing.__name__, thing)
        utils.get_input_tensor_by_name = get_input_tensor_by_name  # type: ignore[attr-defined]
        sys.modules["triton_python_backend_utils"] = utils
        try:
            spec = importlib.util.spec_from_file_location("model", model / "1" / "model.py")
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            del sys.modules["triton_python_backend_utils"]
        self.model = module.TritonPythonModel()
        self.model.initialize(
            {
                "model_config": json.dumps(self.config | {"parameters": parameters}),
                "model_instance_kind": kind,
                "model_instance_device_id": str(device),
                "model_instance_name": f"{model.name}_0_0",
                "model_repository": str(model),
                "model_version": "1",
                "model_name": model.name,
            }
        )

    def request(
        self, inputs: Mapping[str, Any], outputs: tuple[str, ...] = ("png",)
    ) -> InferenceRequest:
        """A request whose tensors fit the configuration: {"prompt": [["a"], ["b"]], ...}."""
        rows = {row["name"]: row for row in self.config["input"]}
        assert set(inputs) <= set(rows)
        assert all(name in inputs for name, row in rows.items() if not row.get("optional"))
        tensors = []
        for name, given in inputs.items():
            dtype = NUMPY[rows[name]["data_type"]]
            if dtype == "O":
                given = [[x if isinstance(x, bytes) else x.encode() for x in row] for row in given]
            array = np.array(given, dtype)
            self.fits(array, rows[name])
            tensors.append(Tensor(name, array))
        assert set(outputs) <= {row["name"] for row in self.config["output"]}
        return InferenceRequest(tensors, list(outputs))

    def infer(self, *requests: InferenceRequest) -> list[dict[str, np.ndarray] | TritonError]:
        """Outputs by name, or the error, of every request."""
        responses = self.model.execute(list(requests))
        assert len(responses) == len(requests)
        rows = {row["name"]: row for row in self.config["output"]}
        answers: list[dict[str, np.ndarray] | TritonError] = []
        for request, response in zip(requests, responses):
            if response.has_error():
                assert not response.output_tensors()
                answers.append(response.error())
                continue
            found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            assert list(found) == request.requested_output_names()
            images = len(request.inputs()[0].as_numpy())
            for name, array in found.items():
                assert array.dtype == np.dtype(NUMPY[rows[name]["data_type"]])
                assert len(array) == images
                self.fits(array, rows[name])
            answers.append(found)
        return answers

    def fits(self, array: np.ndarray, row: Mapping[str, Any]) -> None:
        """A tensor with its batch dimension against dims."""
        assert 1 <= len(array) <= self.config["max_batch_size"]
        assert len(array.shape) == 1 + len(row["dims"]), (row["name"], array.shape)
        for size, dim in zip(array.shape[1:], row["dims"]):
            assert dim in (-1, size), (row["name"], array.shape)
