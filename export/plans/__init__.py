"""TensorRT plans: one per block type and number of experts, weights bound at run time.

Block graphs enter, plan files and their place in the manifest leave. No GPU is needed with
TensorRT-RTX.

    build             Block graphs compiled to TensorRT plans
    compiler          The compiler behind `--trt` and `--trt-rtx`: which module, for which GPUs
    compiler_process  The process that builds one plan: `python compiler_process.py FOLDER`
    fuse              Block graphs in the form from which TensorRT fuses most: the same function
    layers            What a compiled plan runs: the builder's layer dump
    segments          A block graph cut at its routed experts: dense segments
    expert_kernels    `d2m export --cubins`: segments of blocks and the experts' kernels
    plugins           TensorRT plugins of the routed experts' kernels
"""
