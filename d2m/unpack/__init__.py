"""Checkpoints as people have them become what the rest of d2m reads: a pipeline directory.

A single file of a transformer (safetensors with the makers' names, fp8 with or without scales,
GGUF) and a pipeline that gives everything else enter; so does a pipeline stored as a variant.
A directory leaves, whose transformer is written tensor by tensor and whose other parts are links.

    stored       The tensors of a single file, read one by one, quantised ones as numbers again
    single_file  A single file and a base pipeline -> a pipeline directory
    dense        What `d2m convert` is given -> the directory it reads
    variants     A pipeline whose files are `*.fp16.safetensors` -> one without the variant's name
"""
