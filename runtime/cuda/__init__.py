"""A CUDA device, shared by ONNX Runtime on CUDA and TensorRT.

Addresses and copies; no other file of the runtime names CUDA's driver.

    device    What is used of a CUDA device: memory, copies, one stream
    memory    What an executor of plans holds on a device: weights
    arena     Tensors in device memory: what they are called and measure
"""
