"""A LoRA of a dense model, fused into a sparse or dense one.

A LoRA file and a pipeline directory enter, a pipeline directory leaves: every row of the LoRA's
change goes where the conversion took its neuron.

    fuse      A dense LoRA on a sparse model: every row of its change goes where the neuron went
    file      A LoRA file's changes as torch's tensors (read by runtime.lora)
    card      The model card and the report of the result
    parts     Where the weight of a dense Linear lies in a sparse model: its rows and columns
"""
