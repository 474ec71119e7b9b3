"""A dense teacher made from nothing, of shapes or of emoji: `python -m scripts.teacher`.

pipeline  The result: a FluxPipeline directory that diffusers loads as it loads any other
vae       Stage 1: a VAE that makes 4 x 8 x 8 latents of 32 x 32 images, 16 x 8 x 8 of 64 x 64
text      Stage 2: tokenizers
flow      Stages 3 and 4: the transformer learns flow matching, then guidance in a single pass
refit     A trained transformer gets other text encoders: its two text embedders
loop      The training loop of every stage: AdamW, an average of the weights, a log
state     Training state in one safetensors file: never half written, never pickle
cache     What the transformer trains on, encoded once
subject   What a teacher learns: a world, as the stages see it, and the networks' sizes
scenes    The shapes world as the stages see it
emoji     The emoji world as the stages see it
labels    A head that learns to name what every patch of a training picture shows
card      Write the dense teacher's model card, training curve and scores beside its weights
"""
