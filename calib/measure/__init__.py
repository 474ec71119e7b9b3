"""Measured by running a model on calibration data.

A model and batches enter, tensors and figures leave.

    importance       How much every hidden neuron of a dense FFN matters
    sensitivity      How much a dense transformer's output suffers: from a block left out
    routing          Routing statistics: what a sparse model's experts and blocks are used for
    blocks_run       Which blocks of its groups a model runs, by noise level and by kind of prompt
    image_positions  Which experts each part of the image uses
"""
