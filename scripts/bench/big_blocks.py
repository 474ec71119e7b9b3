"""FLUX-sized blocks in ONNX Runtime on the CPU against torch: one double, one single, the whole.

    python -m scripts.bench.big_blocks SPARSE BUNDLE [--tokens 64] [--text 16] [--json FILE]

SPARSE and BUNDLE as scripts/bench/big.py --keep leaves them (--blocks 1D+1S): random weights in
bfloat16. The bundle computes in float32 from weights stored in bfloat16. Compared are torch in
float32 with ONNX Runtime, block by block and as one graph (transformer.onnx, its weights mapped
from safetensors and linked shards), and torch in bfloat16 with torch in float32: the scale of what
rounding does. A bfloat16 graph is opened too, and what ONNX Runtime says to it is written down.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from scripts.figures import options, write_figures


def main(argv: list[str] | None = None) -> int:
    """Compare, print and write the figures; 1 where float32 differs by more than 1e-4."""
    parser = options(__doc__)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="of the image, a square number")
    parser.add_argument("--text", type=int, default=16, help="tokens of the text (%(default)s)")
    arguments = parser.parse_args(argv)
    figures: dict[str, Any] = {"image_tokens": arguments.tokens, "text_tokens": arguments.text}
    wide = torch_run(arguments.sparse, arguments.tokens, arguments.text, "float32")
    figures["torch_float32_s"] = wide.pop("seconds")
    narrow = torch_run(arguments.sparse, arguments.tokens, arguments.text, "bfloat16")
    figures["torch_bfloat16_s"] = narrow.pop("seconds")
    figures["bfloat16_against_float32"] = {
        name: error(narrow[name][1], wide[name][1]) for name in wide
    }
    figures["onnxruntime_against_torch"] = onnx_run(arguments.bundle, wide, figures)
    figures["bfloat16_in_onnxruntime"] = bfloat16_graph(arguments.sparse)
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(figures, indent=2))
    if arguments.json:
        write_figures(arguments.json, "scripts.bench.big_blocks", figures)
    return int(max(figures["onnxruntime_against_torch"].values()) > 1e-4)


def torch_run(sparse: Path, image: int, text: int, dtype: str) -> dict[str, Any]:
    """{"transformer" and block names: (inputs, outputs)} of one step, by name, and "seconds"."""
    import torch

    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
    from export.families import FAMILIES
    from export.parity.torch_recording import Recording, watch_transformer

    model = SparseFluxTransformer2DModel.from_pretrained(
        sparse / "transformer", torch_dtype=getattr(torch, dtype)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    side = round(image**0.5)
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None, :]
    config = model.config
    shapes = {
        "hidden_states": (1, image, config.in_channels),
        "encoder_hidden_states": (1, text, config.joint_attention_dim),
        "pooled_projections": (1, config.pooled_projection_dim),
    }
    inputs = {
        name: torch.randn(s, generator=generator).to(model.dtype) for name, s in shapes.items()
    }
    inputs |= {"timestep": torch.full((1,), 0.5), "guidance": torch.full((1,), 3.5)}
    inputs |= {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(text, 3)}
    record = Recording()
    began = time.perf_counter()
    with torch.no_grad(), watch_transformer(model, FAMILIES["flux"], record, [0]):
        model(**inputs, return_dict=False)
    seconds = round(time.perf_counter() - began, 2)
    found = {name.rstrip("."): pair for name, pair in record.blocks[0].items()}
    return {**found, "transformer": record.components["transformer"], "seconds": seconds}


def onnx_run(bundle: Path, wide: dict[str, Any], figures: dict[str, Any]) -> dict[str, float]:
    """Relative errors of blocks fed with torch's inputs, and of the graph of the whole."""
    from runtime.bundle.directory import open_bundle
    from runtime.ort.component import Blocks, Graph

    opened = open_bundle(bundle, check="sizes")
    blocks = Blocks(opened, "transformer", 1)
    errors = {}
    for call in opened.component("transformer")["program"]:
        name = call["prefix"].rstrip(".")
        if not name:
            continue
        inputs, outputs = wide[name]
        found = blocks.block(call["type"], call["prefix"], inputs)
        errors[name] = error(found, outputs)
    del blocks
    began = time.perf_counter()
    graph = Graph(opened, "transformer", 1)
    figures["session_s"] = round(time.perf_counter() - began, 2)
    inputs, outputs = wide["transformer"]
    began = time.perf_counter()
    found = graph({name: inputs[name] for name in opened.component("transformer")["inputs"]})
    figures["onnxruntime_s"] = round(time.perf_counter() - began, 2)
    return errors | {"transformer": error(found, outputs)}


def bfloat16_graph(sparse: Path) -> str:
    """What ONNX Runtime's CPU provider says to the single block's graph in bfloat16."""
    import onnxruntime
    import torch

    from export.checkpoint.pipeline import empty_transformer
    from export.families.flux import FLUX
    from export.graph.blocks import transformer_program

    skeleton = empty_transformer(sparse)
    program = transformer_program(skeleton, FLUX.tracing, torch.bfloat16, (2,))
    kind = next(row for name, row in program.types.items() if name.startswith("single"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "block.onnx")
        path.write_bytes(next(iter(kind.graphs.values())).SerializeToString())
        try:
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as refusal:  # its exceptions share no base class but Exception
            return " ".join(str(refusal).split())[:200]
    return "opens"


def error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest |found - expected| / |expected| of the outputs."""
    names = [name for name in expected if name in found]
    assert names, (list(found), list(expected))
    return max(
        float(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]))
        for name in names
    )


if __name__ == "__main__":
    sys.exit(main())
