"""From a sparse checkpoint to a bundle: ONNX graphs per block type, engine plans, parity."""
