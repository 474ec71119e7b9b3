"""Memory of decoding a picture: what ONNX Runtime on a CPU holds at once, by the picture's size.

    python -m scripts.bench.decoder [--decoders flux,qwen] [--sizes 256,512] [--json FILE]

The VAE decoders of published models with random weights, each size in a process of its own. Told is
the growth of the resident peak over the open session, in bytes a pixel, and over one tensor of the
picture's size as wide as the last doubling makes it, which is what `d2m doctor` counts in.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

from runtime.files.atomic import write_json  # noqa: E402
from runtime.measure.cold_start import peak  # noqa: E402

DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
FLUX = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
CHANNELS = 16  # of the latents of both


def decoder(name: str) -> Any:
    """flux or qwen: the decoding half of diffusers' class with its published sizes."""
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

    from export.families import encoders as components
    from export.families import qwen_vae as qwenvae

    if name == "qwen":
        return qwenvae.Decoder(AutoencoderKLQwenImage()).eval()
    vae = AutoencoderKL(**FLUX, down_block_types=DOWN, up_block_types=UP, use_post_quant_conv=False)
    return components.Decoder(vae).eval()


def write(name: str, path: Path) -> None:
    """Its ONNX graph, for any size."""
    import torch

    sides = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    options: dict[str, Any] = {"dynamo": True, "dynamic_shapes": [sides], "verbose": False}
    torch.onnx.export(
        decoder(name), (torch.randn(1, CHANNELS, 16, 16),), path, input_names=["latents"], **options
    )


def decode(path: str, size: int) -> dict[str, float]:
    """One picture of `size` x `size` in this process, and what it took."""
    import numpy as np
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    latents = np.random.default_rng(0).standard_normal((1, CHANNELS, size // 8, size // 8))
    before, began = peak() or 0.0, time.perf_counter()
    (image,) = session.run(None, {"latents": latents.astype(np.float32)})
    assert image.shape == (1, 3, size, size), image.shape
    seconds = time.perf_counter() - began
    grown = (peak() or 0.0) - before  # MiB
    return {"bytes": round(grown * 2**20), "seconds": round(seconds, 1)}


def main() -> None:
    """Every decoder and size; print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--decoders", default="flux,qwen", help="(%(default)s)")
    parser.add_argument("--sizes", default="256,512", help="(%(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(decode(options.run[0], int(options.run[1]))))
        return
    import onnxruntime

    from d2m.families import FAMILIES

    beside = {family.names.name: family.plan.encoders["vae"] for family in FAMILIES}
    rows = []
    for name in options.decoders.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "decoder.onnx"
            write(name, path)
            for size in map(int, options.sizes.split(",")):
                command = [sys.executable, "-m", "scripts.bench.decoder"]
                command += ["--run", str(path), str(size)]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                pixel = found["bytes"] / size**2
                widest = 4 * beside[name].widest
                row = {"decoder": name, "size": size, **found, "bytes_a_pixel": round(pixel)}
                rows.append(row | {"widest_tensors": round(pixel / widest, 2)})
                print(json.dumps(rows[-1]), flush=True)
    if options.json:
        answer = {"onnxruntime": onnxruntime.__version__, "threads": 1, "rows": rows}
        write_json(options.json, answer)


if __name__ == "__main__":
    main()
