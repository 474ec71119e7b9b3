"""What is run by hand from a checkout: `python -m scripts.NAME`.

`demo` is the tutorial: the whole way once. `bench/` benchmarks on a CPU, `gpu/` on a
GPU, `reproduce/` the paper's comparisons, `teacher/` the dense shapes teacher from nothing,
`faults/` kill -9 and full disks, `fuzz/` hostile bytes.

    demo      The whole way once, typed as a person would type it: this script is the tutorial
    gallery   The dense teacher and the embedded sparse model side by side: same prompts, same
              noise
"""
