"""What scripts/bench_gpu.py measures: timing, one FFN, blocks, a whole step, the shapes model."""
