"""LoRAs of a dense model: read, and placed in a bundle's weights while it is open. numpy alone.

A LoRA file enters; for every Linear of the dense model that it changes, a matrix to add leaves. It
is part of the ground (d2m fuses the same files into checkpoints, d2m.lora), so it stands on
runtime.files alone.

    original_names  What the makers of a model call its layers
    names           What a LoRA file calls the layers of a model
    changes         What is added to a Linear's weight: products, in rows and columns
    file            A LoRA file, read
    folder          LoRAs that requests to a server may name
    placement       Where a change lies in a bundle's tensors, and these with it added
"""
