"""`python -m d2m.kernels build`: cubins, PTX and their manifest in a directory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from d2m.families import family_of
from d2m.families.site import ACTIVATIONS
from d2m.kernels.plan import Sizes
from runtime.files.checked_json import read_json
from runtime.files.tensors import read_header, shapes_of, weight_files


def parser() -> argparse.ArgumentParser:
    """The command line; --sparse reads the sizes from a sparse model's config.json."""
    top = argparse.ArgumentParser(prog="python -m d2m.kernels", description=__doc__)
    build = top.add_subparsers(dest="command", required=True).add_parser(
        "build", help="compile the routed experts ahead of time; no GPU is needed"
    )
    build.add_argument("-o", "--out", type=Path, required=True, help="directory to write")
    build.add_argument("--sm", default="80,90,120", help="compute capabilities, such as 80,90,120")
    build.add_argument("--sparse", type=Path, help="sparse pipeline directory, for the sizes")
    build.add_argument("--width", type=int, default=3072, help="D, the model's width")
    build.add_argument("--experts", type=int, default=12, help="E")
    build.add_argument("--hidden", type=int, default=768, help="H, hidden neurons an expert")
    build.add_argument("--activation", default="gelu_tanh", help=", ".join(ACTIVATIONS))
    build.add_argument("--no-bias", action="store_true", help="experts without hidden biases")
    build.add_argument("--top-k", default="2", help="numbers of experts a token, such as 1,2,4")
    build.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32")
    build.add_argument("--streams", default="image,text", help="image (>= 2048 tokens), text")
    return top


def sizes_of(sparse: Path, dtype: str) -> Sizes:
    """D, E, H and kind of a sparse pipeline (or of its transformer's directory)."""
    for path in (sparse / "transformer" / "config.json", sparse / "config.json"):
        if path.is_file():
            values = read_json(path)
            shapes: dict[str, tuple[int, ...]] = {}
            for file in weight_files(path.parent):
                shapes |= shapes_of(read_header(file))
            break
    else:
        raise FileNotFoundError(
            f"{sparse} holds no transformer/config.json, expected a sparse pipeline directory; make"
            " one with: d2m convert DENSE -o SPARSE"
        )
    names = ("num_attention_heads", "attention_head_dim", "num_experts", "expert_ratio")
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}, expected a sparse model's config; give the sizes"
            " with --width, --experts and --hidden."
        )
    heads, dim, experts, ratio = (values[name] for name in names)
    width = heads * dim
    for name in shapes:
        if name.endswith(".experts.w2"):  # what there is says more than a config
            experts, hidden, width = shapes[name]
            activation = family_of(values).blocks.sites[0].activation
            bias = name.replace(".w2", ".b1") in shapes
            return Sizes(1, width, experts, hidden, 1, dtype, activation, bias)
    return Sizes(1, width, experts, round(ratio * width), 1, dtype)


def numbers(name: str, text: str) -> list[int]:
    """'1,2,4' -> [1, 2, 4]; ValueError otherwise."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{name} is {text!r}, expected whole numbers such as 80,90.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with one sentence on stderr."""
    given = parser().parse_args(arguments)
    try:
        own = (given.dtype, given.activation, not given.no_bias)
        sizes = Sizes(1, given.width, given.experts, given.hidden, 1, *own)
        if given.sparse is not None:
            sizes = sizes_of(given.sparse, given.dtype)
        sm, top_k = numbers("--sm", given.sm), numbers("--top-k", given.top_k)
        streams = [part for part in given.streams.split(",") if part]
        from d2m.kernels.package import build, plain_code

        def tell(phase: str, done: int, total: int) -> None:
            print(f"{phase} ({done}/{total})", file=sys.stderr, flush=True)

        with plain_code():
            manifest = build(given.out, sizes, sm, top_k, streams=streams, progress=tell)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    total = sum(row["size"] for row in manifest["files"].values())
    print(f"{given.out}: {len(manifest['kernels'])} kernels, {total} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
