"""The tensors of a single file, read one by one; quantised ones come out as numbers again.

Kinds of files: safetensors with plain numbers; with float8 weights, alone or with a scale beside
each (ComfyUI's `scale_weight`, BFL's `weight_scale`); GGUF (llama.cpp's formats, read with the
`gguf` package). Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.files.extras import need
from runtime.files.kinds import kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Before every name of the transformer, in files that hold it alone or a whole pipeline.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
# What a whole pipeline's file holds beside the transformer.
OTHERS = ("text_encoders.", "cond_stage_model.", "conditioner.", "first_stage_model.", "vae.")
SCALES = (".scale_weight", ".weight_scale")  # of a layer's weight, one number or one a row
# Scales of activations, and marks of a format: what the weights' numbers do not depend on.
MARKS = (".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant")
FLOATS = ("F64", "F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, the dtype that `read` gives, and what it was stored as."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str
    read: Callable[[], Tensor]


@contextmanager
def open_stored(path: Path) -> Iterator[dict[str, Stored]]:
    """Name, without prefix -> the tensor, of a .safetensors or .gguf file's transformer.

    Quantised weights are read as bfloat16. FileNotFoundError, ImportError or ValueError, in one
    sentence, for other files and for formats that are not known.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; expected a .safetensors or .gguf checkpoint.")
    if path.suffix == ".gguf":
        yield transformer_of(_gguf(path), path)
        return
    if path.suffix != ".safetensors":
        what, cure = kind(path)
        raise ValueError(f"{path} {what}, expected .safetensors or .gguf; {cure or 'convert it'}.")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield transformer_of(_safetensors(file, path), path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file ({error}); copy it again, nothing is unpickled."
        ) from error


def transformer_of(tensors: dict[str, Stored], path: Path) -> dict[str, Stored]:
    """The transformer's tensors by names without prefix; other parts of a pipeline are left out."""
    for prefix in PREFIXES:
        found = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        if found:
            return found
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHERS)}
    if not found:
        raise ValueError(f"{path} holds no transformer; expected a checkpoint of one.")
    return found


def _safetensors(file: Any, path: Path) -> dict[str, Stored]:
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    names = [name for name in file.keys() if not name.endswith(MARKS)]  # noqa: SIM118
    scales = {
        f"{name.removesuffix(end)}.weight": name
        for name in names
        for end in SCALES
        if name.endswith(end)
    }
    found = {}
    for name in sorted(set(names) - set(scales.values())):
        piece = file.get_slice(name)
        stored, shape = piece.get_dtype(), tuple(piece.get_shape())
        if stored not in FLOATS + FLOAT8:
            raise ValueError(
                f"{path} stores the tensor {name} as {stored}, expected numbers of 8 bits or more "
                "(F32, F16, BF16, F8); take the weights in bfloat16."
            )
        if name in scales and stored not in FLOAT8:
            raise ValueError(
                f"{path} has a scale for {name}, which is {stored}, expected float8; take the "
                "weights in bfloat16."
            )

        def read(name: str = name) -> Tensor:
            tensor: Tensor = file.get_tensor(name)
            if not tensor.dtype.is_floating_point or tensor.dtype.itemsize > 1:
                return tensor
            values = tensor.float()
            if name in scales:
                scale = file.get_tensor(scales[name]).float()
                # One number, or one for every output, which is a row.
                values *= (
                    scale if scale.numel() == 1 else scale.reshape(-1, *[1] * (values.ndim - 1))
                )
            return values.to(torch.bfloat16)

        found[name] = Stored(shape, dtypes.get(stored, torch.bfloat16), stored, read)
    if lost := scales.keys() - found.keys():
        raise ValueError(
            f"{path} has a scale for {min(lost)} but not the weight; copy the file again."
        )
    return found


def _gguf(path: Path) -> dict[str, Stored]:
    import torch

    try:
        import gguf
        from gguf.quants import dequantize
    except ImportError as error:
        raise ImportError(need("gguf", "reading GGUF files needs gguf", error)) from None
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is not a GGUF file ({reason}); copy it again.") from None
    plain = {"F32": torch.float32, "F16": torch.float16}
    found = {}
    for row in reader.tensors:
        stored = row.tensor_type.name
        shape = tuple(int(size) for size in reversed(row.shape))  # ggml's order is the other way
        dtype = plain.get(stored, torch.bfloat16)

        def read(row: Any = row, shape: Any = shape, dtype: Any = dtype) -> Tensor:
            values = dequantize(row.data, row.tensor_type)
            return torch.from_numpy(values.copy()).reshape(shape).to(dtype)

        found[row.name] = Stored(shape, dtype, stored, read)
    if not found:
        raise ValueError(f"{path} holds no tensors; copy it again.")
    return found


def quantised(tensors: Iterable[Stored]) -> list[str]:
    """The formats of tensors that were not stored as plain numbers, each once."""
    return sorted({row.stored for row in tensors} - {*FLOATS})
