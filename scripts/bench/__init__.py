"""Benchmarks on a CPU: one file, one question, JSON out.

adaln        How close to its teacher a model with shared modulation starts: single against low
             rank
big          From a synthetic FLUX to a bundle: peak memory, time and bytes of make, convert
             and export
big_blocks   FLUX-sized blocks in ONNX Runtime on the CPU against torch: one double, one
             single, the whole
blocks       What a skipped block costs in ONNX Runtime on the CPU: a bundle's transformer at
             every kappa
bodies       All ways to run d2m::RoutedExperts in ONNX Runtime on the CPU, side by side, in
             turns
decoder      Memory of decoding a picture: what ONNX Runtime on a CPU holds at once, by the
             picture's size
ffn          One FFN in ONNX Runtime on the CPU: sparse (1S12E2A) against the dense one it
             replaces
layer        What one FFN of the teacher can be distilled to alone: experts against as many
             fixed neurons
model        Whole images through ONNX Runtime on the CPU: a sparse bundle against the dense
             model's
offload      Memory and time of a drawing with weights streamed block by block, against weights
             held
random_flux  A synthetic pipeline of FLUX.1 [dev]'s size: real classes, real shapes, random
             weights
rtx_plan     Does a TensorRT-RTX plan for this GPU build, pass its validity check, load and
             run?
serve        Load on `d2m serve` from a second process: every request answered, and memory over
             a soak
start        Cold start of the runtime: import, open, first image; then steps per second
"""
