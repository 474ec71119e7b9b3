"""Benchmarks on a GPU, correctness first: `scripts/gpu.sh`.

setting    What a run of the benchmark is made at: FLUX.1 [dev]'s sizes on a GPU
cells      What is measured, section by section, as named cells
ffn_cells  The cells of one FFN: every realisation's correctness
layer      One FFN of a block: what it is compared with, and whether each contender is right
flux       A FLUX transformer in torch alone, dense or sparse: for machines without diffusers
shapes     The shapes model that ships with d2m, its transformer run by torch on any device
timing     Time of a piece of GPU work: rotated buffers, CUDA graph replay
rtx_plan   Whether a TensorRT-RTX plan for this GPU builds, loads and runs
roofline   The figures of scripts.gpu as Markdown tables and a roofline drawing
"""
