"""What is run by hand from a checkout: `python -m scripts.NAME`.

`demo` is the tutorial: the whole way once; `gallery` the picture of the README; `diffusers_suite`
diffusers' own tests on the sparse classes; `container.sh` the Dockerfile without Docker.

    bench/      benchmarks on a CPU
    gpu/        benchmarks on a GPU (scripts/gpu.sh)
    reproduce/  the paper's comparisons
    teacher/    the dense shapes teacher, made from nothing
    faults/     kill -9, full disks, clocks that jump
    fuzz/       hostile bytes
"""
