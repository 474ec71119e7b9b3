"""A bundle is data: opened, checked to the last field, nothing executed.

A directory enters, a `Bundle` leaves: its manifest, files whose hashes hold, signature.

    directory       A bundle directory: opened once, every file's size and hash checked
    manifest        The manifest of a bundle, checked to the last field
    reading         Files of a bundle read as data of unknown origin: inside its directory
    onnx_file       An ONNX file read as far as safety needs, before ONNX Runtime opens it
    onnx_constants  Memory that ONNX Runtime takes for the constants of a graph
    tokenizer_file  A tokenizer.json checked as data before the tokenizers library opens it
    control_record  A ControlNet's bundle: one component, and what its manifest says of it
    lora_record     Where every Linear of the dense model lies in it, for LoRAs
    block_groups    Mixture of Blocks in a program: which calls of a group run
    kernel_package  A package of kernels (`python -m d2m.kernels build`)
    trial           Foreign bundles: their graphs run first in a process of its own
    signature       Signed bundles: an Ed25519 signature of manifest.json
    signing         Signing bundles: pairs of keys made, manifests signed
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from runtime.bundle.directory import Bundle, open_bundle

__getattr__, __dir__, __all__ = lazy(__name__, {"runtime.bundle.directory": "Bundle open_bundle"})
