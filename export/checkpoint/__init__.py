"""The pipeline directory that is read, and the bundle's weights that are written.

Tensor by tensor, so that memory stays small at any size.

    pipeline       The pipeline directory that is exported: its models, and the facts a manifest
                   states of it
    weights        A bundle's safetensors: a checkpoint's tensors re-laid as the block graphs take
                   them
    shared_shards  `d2m export --link`: weights that a bundle takes as they are, shared with the
                   checkpoint on disk
"""
