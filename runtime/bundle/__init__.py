"""A bundle is data: opened, checked to the last field, nothing executed.

A directory enters, a `Bundle` leaves: its manifest, files whose hashes hold, signature.

    directory       A bundle directory: opened once, every file's size and hash checked, nothing
                    executed
    manifest        The manifest of a bundle, checked to the last field: nothing after this needs
                    to doubt it
    reading         Files of a bundle read as data of unknown origin: inside its directory, of the
                    stated size
    onnx_file       An ONNX file read as far as safety needs, before ONNX Runtime opens it; no onnx
                    package
    onnx_constants  How much memory ONNX Runtime may take for constants that it computes while a
                    graph opens
    tokenizer_file  A tokenizer.json looked at before the tokenizers library compiles and runs what
                    it says
    block_groups    Mixture of Blocks in a program: which calls of a group run, and for which
                    samples of a batch
    kernel_package  A package of kernels (`python -m d2m.kernels build`), opened with every field
                    checked
    signature       Signed bundles: an Ed25519 signature of manifest.json, which names the hash of
                    every other file
    signing         Signing bundles: pairs of keys made, manifests signed, and all of a bundle
                    verified anew
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from runtime.bundle.directory import Bundle, open_bundle

__all__ = ["Bundle", "open_bundle"]
__getattr__, __dir__ = lazy(
    __name__,
    {
        "Bundle": "runtime.bundle.directory",
        "open_bundle": "runtime.bundle.directory",
    },
)
