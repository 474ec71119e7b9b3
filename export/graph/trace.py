"""One torch module traced once to an ONNX graph whose weights are inputs.

Linear weights come in matmul-ready [in, out]; batch and token dimensions stay dynamic; weights are
never read, so a module may live on the meta device. The graph is then cleaned: constants folded,
shape arithmetic of reshapes replaced by 0 and -1, metadata dropped (it names local files).
"""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.op.schema import OPSET, translation_table

if TYPE_CHECKING:
    import onnx

# Sizes of the example that is traced. All different, so that no dimension passes for another;
# "tokens" is text_tokens + image_tokens, as in the rotary embeddings.
EXAMPLE = {
    "batch": 2,
    "image_tokens": 9,
    "text_tokens": 5,
    "tokens": 14,
    "reference_tokens": 7,
    "latent_height": 6,
    "latent_width": 10,
}
VECTORS = "vectors"  # a block's weight that export adds: indices of its own rows of a tensor
OUT = "out_"  # graph outputs are named so: a graph cannot read and write one name


def example_size(size: int | str) -> int:
    """A dimension of the example: a number, a name of EXAMPLE, or a multiple ("8*latent_width")."""
    if isinstance(size, int):
        return size
    factor, _, name = size.rpartition("*")
    return int(factor or 1) * EXAMPLE[name]


@dataclass(frozen=True)
class Spec:
    """A tensor's dtype and shape; strings in the shape are dynamic dimensions."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def example(self) -> Tensor:
        """Zeros of the example's sizes (ones in integer tensors)."""
        sizes = [example_size(size) for size in self.shape]
        return torch.zeros(sizes, dtype=self.dtype)

    def json(self) -> dict[str, Any]:
        """As the manifest writes it."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}


def weight_specs(module: nn.Module, dtype: torch.dtype) -> dict[str, Spec]:
    """Every parameter as the graph takes it: Linear weights transposed; in float32 routers, indices
    and what `keep_float32` has marked."""
    linears = linear_weights(module)
    specs = {}
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        kept = stays_float32(name) or dtype in getattr(parameter, "float32_for", ())
        kind = torch.float32 if kept else dtype
        specs[name] = Spec(kind, shape[::-1] if name in linears else shape)
    return specs


def keep_float32(model: nn.Module) -> None:
    """Mark the parameters that the model's class keeps in float32 when it is loaded in half."""
    for name, parameter in model.named_parameters():
        if dtypes := float32_for(model, name):
            parameter.float32_for = dtypes  # type: ignore[attr-defined]


def float32_for(model: nn.Module, name: str) -> tuple[torch.dtype, ...]:
    """The half types in place of which the model's class loads a parameter in float32.

    read: transformers' `_keep_in_fp32_modules` (T5's wo, which overflows) is for float16 alone,
    its `_strict` one and diffusers' for both; a name in them is a part of the parameter's.
    """
    halves = (torch.float16, torch.bfloat16)
    lists = {
        "_keep_in_fp32_modules": halves[:1] if hasattr(model, "config_class") else halves,
        "_keep_in_fp32_modules_strict": halves,
    }
    found: tuple[torch.dtype, ...] = ()
    for field, dtypes in lists.items():
        if set(getattr(model, field, None) or ()).intersection(name.split(".")):
            found = dtypes
    return found


def linear_weights(module: nn.Module) -> set[str]:
    """Names of the parameters that are an nn.Linear's weight."""
    return {
        f"{name}.weight" if name else "weight"
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }


def stays_float32(name: str) -> bool:
    """Whether a parameter is a router's, of experts or blocks, or VECTORS: float32 everywhere."""
    parts = name.split(".")
    return parts[-2:-1] == ["gate"] or parts[-3:-2] == ["router"] or parts[-1] == VECTORS


def trace(
    module: nn.Module,
    call: Callable[[Callable[..., Any], dict[str, Tensor]], Any],
    inputs: Mapping[str, Spec],
    outputs: Mapping[str, Spec],
    dtype: torch.dtype,
) -> onnx.ModelProto:
    """The graph of `call(run, tensors)`, where `run(*args, **kwargs)` is the module's forward.

    Graph inputs: `inputs` in order, then the module's parameters by local name. Graph outputs:
    "out_" + the names of `outputs`, in order. The op d2m::RoutedExperts is left bare.
    """
    import onnx_ir as ir

    from export.graph.clean import clean

    weights = weight_specs(module, dtype)
    program = _Program(module, call, list(inputs), list(weights))
    tensors = [spec.example() for spec in inputs.values()]
    # Never read: the trace runs on fake tensors, and untouched memory is not allocated.
    tensors += [torch.empty(spec.shape, dtype=spec.dtype) for spec in weights.values()]
    specs = [*inputs.values(), *weights.values()]
    dynamic = [
        {i: torch.export.Dim.AUTO for i, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in specs
    ]
    keep_signatures()
    with quiet(), torch.no_grad():
        exported = torch.onnx.export(
            program,
            tuple(tensors),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[*inputs, *weights],
            output_names=[OUT + name for name in outputs],
            dynamic_shapes=(tuple(dynamic),),
            custom_translation_table=translation_table(),
        )
    model: ir.Model = exported.model
    name_dimensions(model, specs, list(outputs.values()))
    proto = ir.to_proto(clean(model))
    return proto


@functools.cache
def keep_signatures() -> None:
    """Let onnxscript read the source of each of torch's translations once a process.

    torch makes its table of translations anew for every trace, and as released (onnxscript 0.5 to
    0.7) every function in it reads its own source each time that it is asked for its domain.
    """
    from onnxscript import TracedOnnxFunction

    reading = vars(TracedOnnxFunction).get("function_ir")
    if isinstance(reading, property) and reading.fget is not None:
        kept = functools.cached_property(reading.fget)
        kept.__set_name__(TracedOnnxFunction, "function_ir")
        TracedOnnxFunction.function_ir = kept


class _Program(nn.Module):
    """forward(*inputs, *weights): the module called with weights that are not its own."""

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[Callable[..., Any], dict[str, Tensor]], Any],
        names: Sequence[str],
        weights: Sequence[str],
    ) -> None:
        super().__init__()
        # Out of torch's sight, or the parameters would be traced as this module's.
        self.__dict__["module"] = module.eval()
        self.call, self.names, self.weights = call, names, weights
        # In order: a set's order changes from process to process, and the graph's names with it.
        self.linears = [name for name in weights if name in linear_weights(module)]

    def forward(self, *tensors: Tensor) -> Any:
        values = dict(zip(self.names, tensors))
        weights = dict(zip(self.weights, tensors[len(self.names) :], strict=True))
        for name in self.linears:
            weights[name] = weights[name].t()
        module = self.__dict__["module"]

        def run(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(module, weights, args, kwargs)

        return self.call(run, values)


def name_dimensions(model: Any, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
    """Give the exporter's symbols (s10, "s12 + s21") the names that the specs use.

    AssertionError where a dimension that should be dynamic was traced as a constant.
    """
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        for found, wanted in zip(value.shape, spec.shape, strict=True):
            if isinstance(wanted, str):
                assert isinstance(found, ir.SymbolicDim), (value.name, spec.shape, value.shape)
                names[str(found.value)] = wanted
        value.shape = ir.Shape(spec.shape)
    for value, spec in zip(model.graph.outputs, outputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is None or value.is_graph_output():
                continue
            value.shape = ir.Shape(
                re.sub(r"\bs\d+\b", lambda m: names.get(m[0], m[0]), str(size.value))
                if isinstance(size, ir.SymbolicDim)
                else size
                for size in value.shape
            )


@contextmanager
def quiet() -> Any:
    """Without the exporter's remarks on its own deprecations and on absent torchvision.

    Tracing's debug records are costly where a handler asks for them, as under pytest.
    """
    loud = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace")]
    before = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, before):
            logger.setLevel(level)
