"""The executor on ONNX Runtime, on a CPU or CUDA.

Whole graphs, or block by block with weights held or streamed.

    component       ONNX Runtime: a component as one graph
    blocks          Blocks of a component in ONNX Runtime: a session per block type and top_k
    block_weights   Where a block's weights are when it runs: held from its first run on
    sessions        Sessions of ONNX Runtime on a bundle's graphs
    memory_places   Where ONNX Runtime computes: in the process's memory (CPU), or on a CUDA device
    router_outputs  Routers made to tell their logits: a block graph's bytes
"""
