"""The pipeline directory that is read, and the bundle's weights that are written.

Tensor by tensor, so that memory stays small at any size.

    pipeline       The pipeline directory that is exported: its models
    weights        A bundle's safetensors
    lora_map       Where every Linear of the dense model lies in the bundle
    shared_shards  `d2m export --link`: weights that a bundle takes as they are
"""
