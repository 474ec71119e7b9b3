"""Benchmarks on a CPU: one file, one question, JSON out. (Cold starts: `d2m bench`.)

adaln        How close to its teacher a model with shared modulation starts
big          From a synthetic FLUX to a bundle: peak memory, time and bytes of make
big_blocks   FLUX-sized blocks in ONNX Runtime on the CPU against torch: one double, one single
big_flux2_blocks Real-size blocks of FLUX.2 in ONNX Runtime on the CPU against torch
blocks       What a skipped block costs in ONNX Runtime on the CPU
bodies       All ways to run d2m::RoutedExperts in ONNX Runtime on the CPU, side by side
decoder      Memory of decoding an image: what ONNX Runtime on a CPU holds at once
ffn          One FFN in ONNX Runtime on the CPU
layer        What one FFN of the teacher can be distilled to alone
local        FFNs of a real size that learn by themselves: time and peak memory
lora_switch  Time to add LoRAs to weights of FLUX.1's size as they are bound
model        Whole images through ONNX Runtime on the CPU
offload      Memory and time of a generation with weights streamed block by block
products     A product by a quantised weight in ONNX Runtime on the CPU, against float32
quantised    What a quantised format costs and saves on the shapes world
random_flux  A synthetic pipeline of FLUX.1 [dev]'s size: real classes, real shapes
random_flux2 A synthetic FLUX.2 [klein] of a published size, text encoder and VAE too
serve        Load on `d2m serve` from a second process: every request answered
step_cache   Step caching on a world: steps skipped, error, score, processor time
threads      Training threads beside other load: a step's time by threads
"""
