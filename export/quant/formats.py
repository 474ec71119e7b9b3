"""The formats of `--quant`: rows of data, which everything else reads.

Names of tensors follow NVIDIA ModelOpt and compressed-tensors: a weight keeps its name, its scales
are called `<weight>_scale` (and `<weight>_scale_2`: ModelOpt's second level of NVFP4). The layout
is the bundle's: products read [in, out], or blocks along rows of [out, in] where kernels want so.

Shape letters: K numbers in, N numbers out, G blocks of a row (K / block).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One way to store and multiply weights.

    bits: of a weight; block: numbers that share a scale, 0 where a column of the weight does.
    parts: suffix -> stored type. experts: the format of routed experts, if it is another. sm: the
    oldest GPU whose tensor cores multiply it (0: none, plans read the weights in 16 bits). ONNX
    Runtime's graphs compute in float32 around the products.
    """

    name: str
    bits: int
    block: int
    parts: dict[str, str]
    sm: int = 0
    experts: str = ""

    @property
    def of_experts(self) -> Format:
        """The format of routed experts."""
        return FORMATS[self.experts or self.name]


FORMATS = {
    row.name: row
    for row in (
        # Fastest on CPUs in ONNX Runtime. Weights are -63 to 63: of two products of 8 by 8 bits the
        # sum overflows the 16 bits that CPUs without VNNI have for it, and saturates silently
        # (measured on AVX2: single results 4 to 19 % off), so that CPUs would differ.
        Format("int8", 7, 0, {"": "int8", "_scale": "float32"}),
        # For memory: 4.5 bits a weight with its scales. ONNX Runtime multiplies it (MatMulNBits).
        Format("int4", 4, 32, {"": "uint8", "_scale": "bfloat16"}),
        Format("fp8", 8, 0, {"": "float8_e4m3fn", "_scale": "float32"}, sm=89),
        # Experts are multiplied in batches, for which TensorRT-RTX 1.7.1 has no FP4: it would
        # dequantise them to bfloat16 first (measured on layer dumps).
        Format(
            "nvfp4",
            bits=4,
            block=16,
            parts={"": "uint8", "_scale": "float8_e4m3fn", "_scale_2": "float32"},
            sm=120,
            experts="fp8",
        ),
    )
}
NONE = "none"
FP8_MAX = 448.0  # of float8_e4m3fn
FP4_MAX = 6.0  # of float4_e2m1
INT8_MAX = 63  # of an int8 weight, see above
TOKEN_MAX = 127.0  # of the numbers that int8 weights are multiplied with


def stored_as(dtype: str, second_scale: bool) -> Format:
    """The format of a weight that a safetensors file holds as `dtype`, with scales beside it."""
    names = {"I8": "int8", "F8_E4M3": "fp8", "U8": "nvfp4" if second_scale else "int4"}
    return FORMATS[names[dtype]]


def format_of(name: str) -> Format | None:
    """The row of a name, None for "none"; ValueError for any other."""
    if name == NONE:
        return None
    if name not in FORMATS:
        known = ", ".join([NONE, *FORMATS])
        raise ValueError(f"--quant is {name!r}, expected one of {known}.")
    return FORMATS[name]
