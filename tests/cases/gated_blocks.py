"""Blocks of diffusers with gated FFNs at tiny size, their inputs and sites, dense and converted.

Z-Image has its gates in a Linear of their own, FLUX.2's double blocks gates and values in one
Linear, its single blocks q, k, v, gates and values in one Linear inside the attention.
"""

import dataclasses

import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import nn

from d2m.families import FLUX
from d2m.families.family import BlockLayout
from d2m.families.ffn_sites import read_ffn, sites_of
from d2m.families.site import beside_attention, fused_gated, separate_gated
from d2m.model.surgery import convert_state_dict, sparsify, split_neurons
from d2m.recipe.recipe import SparseSpec
from tests.tiny.pipeline import randomize

B, T, L = 2, 7, 3  # samples, image tokens, text tokens
HEAD = 16


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rotary(tokens):
    """Cosines and sines [tokens, HEAD], every pair of channels alike, as diffusers makes them."""
    angles = noise(tokens, HEAD // 2, seed=9).repeat_interleave(2, dim=1)
    return angles.cos().float(), angles.sin().float()


def z_image(bias):
    block = ZImageTransformerBlock(0, 48, 3, 3, 1e-5, True)
    complexes = torch.polar(torch.ones(B, T, HEAD // 2), noise(B, T, HEAD // 2).float())
    given = {"x": noise(B, T, 48, seed=1), "attn_mask": None, "freqs_cis": complexes}
    given["adaln_input"] = noise(B, 48, seed=2)
    sites = (separate_gated("layers", "feed_forward", ("w1", "w3", "w2"), "both"),)
    return block, given, sites


def flux2_double(bias):
    block = Flux2TransformerBlock(32, 2, HEAD, 3.0, bias=bias)
    given = {"hidden_states": noise(B, T, 32, seed=1)}
    given |= {"encoder_hidden_states": noise(B, L, 32, seed=2), "image_rotary_emb": rotary(T + L)}
    given |= {"temb_mod_img": noise(B, 6 * 32, seed=3), "temb_mod_txt": noise(B, 6 * 32, seed=4)}
    names = ("linear_in", "linear_out")
    sites = tuple(
        fused_gated("layers", module, names, stream)
        for module, stream in (("ff", "image"), ("ff_context", "text"))
    )
    return block, given, sites


def flux2_single(bias):
    block = Flux2SingleTransformerBlock(32, 2, HEAD, 3.0, bias=bias)
    given = {"hidden_states": noise(B, T, 32, seed=1), "encoder_hidden_states": None}
    given |= {"temb_mod": noise(B, 3 * 32, seed=3), "image_rotary_emb": rotary(T)}
    return block, given, (beside_attention("layers", "attn", "both"),)


# (block and its inputs, whether its Linears have biases, hidden neurons of its FFN)
CASES = {
    "Z-Image": (z_image, False, 128),
    "FLUX.2 double": (flux2_double, False, 96),
    "FLUX.2 double with biases": (flux2_double, True, 96),
    "FLUX.2 single": (flux2_single, False, 96),
    "FLUX.2 single with biases": (flux2_single, True, 96),
}
SPEC = SparseSpec()


def layers(make, bias, seed):
    """Two blocks in a model that has nothing else; FLUX.2's gates start at 0 in real training."""
    model = nn.Module()
    model.layers = nn.ModuleList(make(bias)[0] for _ in range(2))
    return randomize(model, seed).double().eval()


def family_of(sites):
    layout = BlockLayout(sites=sites, kinds=(("double", "layers"),), depths=())
    return dataclasses.replace(FLUX, blocks=layout)


def permutations(state, family, shared, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, block, site in sites_of(state, family):
        neurons = read_ffn(state.__getitem__, block, site).neurons
        found[name] = split_neurons(torch.rand(neurons, generator=generator), shared, 12)
    return found


def converted(case):
    make, bias, neurons = CASES[case]
    _, given, sites = make(bias)
    family = family_of(sites)
    dense = layers(make, bias, 0)
    state = dense.state_dict()
    orders = permutations(state, family, neurons // 4)
    sparse = sparsify(layers(make, bias, 1), SPEC, family)
    values = convert_state_dict(state, orders, SPEC, family)
    return dense, sparse, values, given, family, orders


def answers(block, given):
    out = block(**given)
    return out if isinstance(out, tuple) else (out,)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
