"""`d2m export --cubins`: segments of blocks and the experts' kernels, besides whole plans.

A target then offers both: `transformer/double.k2` with the portable body, and the steps that
`segments` lists in its place, `transformer/double.0`, `transformer/double.k2.experts.0` and so on,
where what is no plan is a launch of a package of kernels, `kernels/bf16-12x3072x768`: one for each
size and kind of experts. Which of them runs is decided on the machine that generates
(runtime.trt.experts). Segments are the same for every number of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.plans.segments import Experts, cut
from runtime.files.atomic import write_bytes

if TYPE_CHECKING:
    from d2m.kernels.plan import Sizes

Progress = Callable[[str, int, int], None]
PORTABLE = (80, 89, 120)  # kernels for portable plans: one for each of CUDA's families there
FOLDER = "kernels"
PLAIN = "gelu_tanh"  # what experts do where a manifest says nothing


@dataclass
class CutBlocks:
    """What cutting gives: graphs to compile, and what a target's row of the manifest says of them.

    segments: whole plan -> its steps; experts: step -> top_k; tensors: step -> inputs and outputs.
    """

    graphs: dict[str, Path] = field(default_factory=dict)
    segments: dict[str, list[str]] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)

    def sizes(self, step: str, dtype: str) -> Sizes:
        """Those of a launch's experts, for one token and one expert chosen."""
        from d2m.kernels.plan import Sizes

        inputs = self.tensors[step]["inputs"]
        experts, hidden, width = inputs[-1]["shape"]  # w2
        kind = (dtype, self.activations[step], len(inputs) == 5)
        return Sizes(1, width, experts, hidden, 1, *kind)

    def add_to(self, row: dict[str, Any], dtype: str) -> None:
        """Add the pieces to a target whose segments have been compiled, its kernels in `dtype`."""
        row["segments"] = self.segments
        row["experts"] = {
            step: {"top_k": top_k, "kernels": package_name(self.sizes(step, dtype))}
            | ({} if self.activations[step] == PLAIN else {"activation": self.activations[step]})
            for step, top_k in self.experts.items()
        }
        row["tensors"] |= self.tensors


def check_cubins(plans: bool, sparse: bool, plugin: bool, sm: Sequence[int]) -> None:
    """Refuse --cubins where it has no meaning, or no kernels can be built."""
    from d2m.kernels.package import SM, triton_version

    if not plans or not sparse or plugin:
        what = "with --plugin" if plugin else "without --trt or --trt-rtx"
        raise ValueError(
            f"--cubins is given {what if sparse else 'for a dense pipeline'}, expected plans of a"
            " sparse pipeline: kernels take the place of the routed experts' portable body."
        )
    unknown = [str(number) for number in sm if number not in SM]
    if unknown:
        raise ValueError(
            f"--sm is {','.join(unknown)} with --cubins, expected some of"
            f" {', '.join(map(str, SM))}, which the kernels are written for; leave --cubins out."
        )
    triton_version()


def cut_blocks(graphs: Mapping[str, Path], folder: Path) -> CutBlocks:
    """Cut every graph with routed experts; segments are written to `folder`, once for all top_k.

    graphs: "transformer/double.k2" -> ONNX file.
    """
    import onnx

    pieces = CutBlocks()
    for key, path in sorted(graphs.items()):
        steps = cut(onnx.load(str(path)))
        if len(steps) == 1:
            continue
        block, _, top_k = key.rpartition(".k")
        names: list[str] = []
        for step in steps:
            if isinstance(step, Experts):
                name = f"{key}.experts.{sum(n in pieces.experts for n in names)}"
                pieces.experts[name] = int(top_k)
                pieces.activations[name] = step.activation
                pieces.tensors[name] = {"inputs": list(step.inputs), "outputs": [step.output]}
            else:
                name = f"{block}.{sum(n in pieces.graphs for n in names)}"
                if name not in pieces.graphs:
                    pieces.graphs[name] = folder / f"{name}.onnx"
                    write_bytes(pieces.graphs[name], step.SerializeToString(deterministic=True))
            names.append(name)
        pieces.segments[key] = names
    return pieces


def build_kernels(
    out: Path,
    pieces: CutBlocks,
    dtype: str,
    sm: Sequence[int],
    *,
    ptx: bool = False,
    progress: Progress | None = None,
) -> None:
    """Packages of kernels for all experts of `pieces`, in dtype fp32, bf16 or fp16, below `out`.

    `ptx`: with what TensorRT plugins are made from, and in `out` itself, for one size of experts.
    """
    from d2m.kernels.package import build, plain_code

    found = sorted({pieces.sizes(step, dtype) for step in pieces.experts}, key=package_name)
    if not found or not sm or (ptx and len(found) > 1):
        what = f"experts of {len(found)} sizes" if sm else "no GPU"
        raise ValueError(
            f"kernels cannot be built: there is {what}, expected one size of experts (--cubins:"
            " or several) and GPUs to build for (--sm, or one in this machine); leave --cubins and"
            " --plugin out."
        )
    with plain_code():
        for size in found:
            chosen = pieces.experts.items()
            ks = sorted({k for step, k in chosen if pieces.sizes(step, dtype) == size})
            folder = out if ptx else out / package_name(size)
            build(folder, size, sm, ks, ptx=ptx, progress=progress)


def package_name(sizes: Sizes) -> str:
    """Where a bundle keeps the kernels for experts of such sizes: kernels/bf16-12x3072x768.

    Others than those with tanh GELU and biases say so: kernels/bf16-12x3072x576-swiglu-no-bias.
    """
    kind = "" if sizes.activation == PLAIN else f"-{sizes.activation}"
    kind += "" if sizes.bias else "-no-bias"
    return f"{FOLDER}/{sizes.dtype}-{sizes.experts}x{sizes.width}x{sizes.hidden}{kind}"


def kernel_sm(apis: Sequence[str], sm: Sequence[int]) -> list[int]:
    """Compute capabilities of the kernels: those of the plans, PORTABLE for portable ones."""
    from export.plans.compiler import local_sm

    here = local_sm() if "tensorrt" in apis else None
    portable = PORTABLE if "tensorrt_rtx" in apis and not sm else ()
    return sorted({*sm, *portable, *([here] if here else [])})
