"""The op `d2m::RoutedExperts` in ONNX.

Its schema, and bodies in standard operators, which ONNX Runtime and TensorRT inline.

    schema      `d2m::RoutedExperts` as ONNX knows it: its schema
    bodies      Bodies of `d2m::RoutedExperts`: the op spelled out in standard ONNX operators
    body_lines  The bodies of `d2m::RoutedExperts`
    top_k       A graph with bare RoutedExperts nodes given another number of experts per token
"""
