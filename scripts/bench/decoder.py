"""Memory of decoding an image: what ONNX Runtime on a CPU holds at once, by the image's size.

    python -m scripts.bench.decoder [--decoders flux,qwen] [--sizes 256,512] [--json FILE]

The VAE decoders of published models with random weights, each size in a process of its own.
The figure is the growth of the resident peak over the open session, in bytes a pixel, and over one
tensor of the image's size as wide as the last doubling makes it, the unit of `d2m doctor`.
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

from runtime.measure.cold_start import peak
from scripts.figures import ROOT, cpu_session, options, write_figures

DOWN, UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
FLUX = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
CHANNELS = 16  # of the latents of both


def decoder(name: str) -> Any:
    """flux or qwen: the decoding half of diffusers' class with its published sizes."""
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

    from export.families import encoders, qwen_vae

    if name == "qwen":
        return qwen_vae.Decoder(AutoencoderKLQwenImage()).eval()
    vae = AutoencoderKL(**FLUX, down_block_types=DOWN, up_block_types=UP, use_post_quant_conv=False)
    return encoders.Decoder(vae).eval()


def write(name: str, path: Path) -> None:
    """Its ONNX graph, for any size."""
    import torch

    sides = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    settings: dict[str, Any] = {"dynamo": True, "dynamic_shapes": [sides], "verbose": False}
    torch.onnx.export(
        decoder(name),
        (torch.randn(1, CHANNELS, 16, 16),),
        path,
        input_names=["latents"],
        **settings,
    )


def decode(path: str, size: int) -> dict[str, float]:
    """One image of `size` x `size` in this process, and what it took."""
    import numpy as np

    session = cpu_session(path, 1)
    latents = np.random.default_rng(0).standard_normal((1, CHANNELS, size // 8, size // 8))
    before, began = peak() or 0.0, time.perf_counter()
    (image,) = session.run(None, {"latents": latents.astype(np.float32)})
    assert image.shape == (1, 3, size, size), image.shape
    seconds = time.perf_counter() - began
    grown = (peak() or 0.0) - before  # MiB
    return {"bytes": round(grown * 2**20), "seconds": round(seconds, 1)}


def main() -> None:
    """Every decoder and size; print and write."""
    parser = options(__doc__)
    parser.add_argument("--decoders", default="flux,qwen", help="(%(default)s)")
    parser.add_argument("--sizes", default="256,512", help="(%(default)s)")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(decode(arguments.run[0], int(arguments.run[1]))))
        return
    import onnxruntime

    from d2m.families.encoders import VAE_16, VAE_QWEN

    vaes = {"flux": VAE_16, "qwen": VAE_QWEN}
    rows = []
    for name in arguments.decoders.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "decoder.onnx"
            write(name, path)
            for size in map(int, arguments.sizes.split(",")):
                command = [sys.executable, "-m", "scripts.bench.decoder"]
                command += ["--run", str(path), str(size)]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                pixel = found["bytes"] / size**2
                widest = 4 * vaes[name].widest
                row = {"decoder": name, "size": size, **found, "bytes_a_pixel": round(pixel)}
                rows.append(row | {"widest_tensors": round(pixel / widest, 2)})
                print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        answer = {"onnxruntime": onnxruntime.__version__, "threads": 1, "rows": rows}
        write_figures(arguments.json, "scripts.bench.decoder", answer)


if __name__ == "__main__":
    main()
