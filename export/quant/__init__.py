"""Quantised weights: `d2m export --quant`.

A format is a row of data; a transformer's program is rewritten to it as a whole, whatever the
family: weights become a quantised tensor and its scales, block graphs read those.

    formats     The formats: bits, blocks, stored types, what becomes of activations, which GPUs
    layers      Which weights are quantised and which stay in 16 or 32 bits
    weights     Weights to quantised tensors and back, a tensor at a time
    activations What a quantised product does to its left side, in torch
    program     A program with quantised weights: block types, their weights, their graphs
    products    Block graphs for ONNX Runtime: a product by a quantised weight, spelled out
    experts     The body of `d2m::RoutedExperts` with quantised experts
    tensorrt    The same functions as TensorRT multiplies in FP8 and FP4
"""
