"""From a sparse pipeline directory to a bundle that needs no torch.

`bundle` is the list of steps. Folders from the ground up: `op/` the op d2m::RoutedExperts in ONNX;
`graph/` a transformer as block graphs and a program that calls them; `families/` what each family
needs; `checkpoint/` the directory that is read and the weights that are written; `plans/` TensorRT;
`parity/` the bundle against torch; `control/` ControlNets, to bundles of their own.

    bundle    `d2m export`
    requantise  `d2m export BUNDLE --quant`: a bundle quantised without its pipeline
    add_encoder  `d2m export --add-vae-encoder`: a VAE encoder for a bundle made without one
    checks    What `d2m export` refuses before it reads a weight: options, libraries, GPUs
    triton    `d2m export --triton-repo`: a model repository for NVIDIA Triton Inference Server
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from export.bundle import export_bundle

__getattr__, __dir__, __all__ = lazy(__name__, {"export.bundle": "export_bundle"})
