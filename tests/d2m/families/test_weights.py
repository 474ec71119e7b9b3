"""The list of weights against real models, weight by weight, and its FLOPs against FlopCounterMode.

FlopCounterMode does not know the CPU's flash attention and would leave it out: attention is
computed by two matrix products here, which it counts.
"""

import collections

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2m.families import FLUX
from d2m.families import weights as shared
from d2m.families.flux.weights import weights
from d2m.families.weights import Structure
from d2m.model.sorted_loop import forward_sorted
from d2m.model.sparse_ffn import SparseFFN
from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
from d2m.plan.count import structure_of, used_share
from d2m.plan.model_config import sizes, subject_of
from d2m.plan.presets import FAMILIES
from d2m.recipe.recipe import SparseSpec, load
from d2m.recipe.structure import AdaLN, Blocks
from tests.cases import flops
from tests.tiny.pipeline import TRANSFORMER_CONFIG, randomize, tiny_inputs, tiny_transformer

FLUX_DEV = subject_of("flux-dev").config
TINY = sizes(TRANSFORMER_CONFIG, "tiny")
SPEC = SparseSpec()
flops.register()


def listed(config, structure):
    """Parameter name -> size; a block's weights stand for all blocks of its kind."""
    found = collections.Counter()
    for stack in weights(config, structure, 16, 8):
        for weight in stack.weights:
            places = range(stack.count) if "*" in stack.prefix else [0]
            for index in places if weight.size else ():
                found[stack.prefix.replace("*", str(index)) + weight.name] += weight.size
    return dict(found)


def real(cls, config, **more):
    fields = {key: value for key, value in config.items() if key in TRANSFORMER_CONFIG}
    with torch.device("meta"):
        model = cls(**fields, axes_dims_rope=(4, 6, 6), **more)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [TINY, FLUX_DEV], ids=["tiny", "flux-dev"])
@pytest.mark.parametrize("blocks", [(2, 2), (3, 0), (0, 1)])
@pytest.mark.parametrize("guided", [True, False])
def test_every_weight_of_a_dense_model(config, blocks, guided):
    config = config | {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    config["guidance_embeds"] = guided
    assert listed(config, Structure()) == real(FluxTransformer2DModel, config)


@pytest.mark.parametrize("config", [TINY, FLUX_DEV], ids=["tiny", "flux-dev"])
@pytest.mark.parametrize("spec", [SPEC, SparseSpec(6, 1.0, 0.5, 1), SparseSpec(4, 2.0, 0.5, 0)])
def test_every_weight_of_a_sparse_model(config, spec):
    config = config | {"num_layers": 2, "num_single_layers": 3}
    more = dict(zip(("num_experts", "shared_ratio", "expert_ratio", "top_k"), vars(spec).values()))
    assert listed(config, Structure(spec)) == real(SparseFluxTransformer2DModel, config, **more)


def flops(config, structure, image, text):
    stacks = weights(config, structure, image, text)
    return sum(stack.active * weight.flops for stack in stacks for weight in stack.weights)


def counted(model, inputs):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("image", "text"), [(16, 8), (64, 3)])
def test_flops_of_a_dense_model(image, text):
    inputs = tiny_inputs(batch=1, image_tokens=image, text_tokens=text)
    assert flops(TINY, Structure(), image, text) == counted(tiny_transformer(), inputs)


@pytest.mark.parametrize("top_k", [0, 1, 2, 12])
def test_flops_of_a_sparse_model(top_k):
    model = SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG, top_k=top_k)
    randomize(model, 0)
    inputs = tiny_inputs(batch=1, image_tokens=16, text_tokens=8)
    structure = Structure(SparseSpec(top_k=top_k))
    assert flops(TINY, structure, 16, 8) == counted(model, inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [0, 2, 12])
@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_a_gated_ffn_by_itself(activation, bias, top_k):
    """Names, sizes and FLOPs of a SparseFFN of 96 neurons at width 32, seven tokens."""
    spec = SparseSpec(top_k=top_k)
    rows = list(shared.sparse_ffn("double_ffn", "ff", 32, 96, spec, 7, activation, bias))
    ffn = SparseFFN(32, 24, 12, 6, top_k, activation=activation, bias=bias)
    real = {f"ff.{name}": parameter.numel() for name, parameter in ffn.named_parameters()}
    assert {w.name: w.size for w in rows if w.size} == real
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ffn(torch.randn(7, 32))
    assert sum(w.flops for w in rows) == counter.get_total_flops()


@pytest.mark.parametrize("linears", [("w1", "w3", "w2"), ("linear_in", "linear_out")])
def test_a_dense_gated_ffn(linears):
    rows = list(shared.gated_ffn("double_ffn", "ff", linears, 32, 96, None, 7))
    assert sum(w.size for w in rows) == 3 * 32 * 96
    assert sum(w.flops for w in rows) == 2 * 7 * 3 * 32 * 96
    assert [w.name for w in rows] == [f"ff.{name}.weight" for name in linears]
    sparse = shared.gated_ffn("double_ffn", "ff", linears, 32, 96, SPEC, 7)
    held = sum(w.size for w in sparse if ".gate." not in w.name)
    assert held == 3 * 32 * 96  # no weight is lost


# ---------------------------------------------------------------- groups and modulation

MODES = [AdaLN(), AdaLN("single"), AdaLN("lowrank", 5), AdaLN("lowrank")]
BLOCKS = [
    Blocks(),
    Blocks(double=((1, 2, 3),), single=((0, 1, 2), (3, 4, 5))),
    Blocks(single=((1, 2, 3),), kappa=2, alpha=0.0),
    Blocks(double=((0, 1),), kappa=2),
]
DEEP = TINY | {"num_layers": 4, "num_single_layers": 6}


def fields(structure):
    """The structure as fields of the sparse model's config."""
    blocks, adaln = structure.blocks.to_dict(), structure.adaln
    groups = {"groups": blocks["groups"], "kappa": blocks["kappa"], "alpha": blocks["alpha"]}
    return groups | {"adaln": adaln.mode, "adaln_rank": adaln.rank}


@pytest.mark.parametrize("adaln", MODES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_every_weight_and_flop_with_groups_and_shared_modulation(adaln, blocks):
    dense_name = pytest.importorskip("d2m.model.grouping", reason="no Mixture of Blocks").dense_name
    structure = Structure(SPEC, blocks, adaln)
    found = real(SparseFluxTransformer2DModel, DEEP, **fields(structure))
    assert {dense_name(name): size for name, size in found.items()} == listed(DEEP, structure)

    depth = {key: DEEP[key] for key in ("num_layers", "num_single_layers")}
    model = SparseFluxTransformer2DModel(**TRANSFORMER_CONFIG | depth, **fields(structure))
    randomize(model, 0)
    inputs = tiny_inputs(batch=1, image_tokens=16, text_tokens=8)
    assert flops(DEEP, structure, 16, 8) == counted(model, inputs)


def test_every_weight_of_the_presets():
    """Preset by preset at FLUX.1 [dev]'s size, on the meta device."""
    dense_name = pytest.importorskip("d2m.model.grouping", reason="no Mixture of Blocks").dense_name
    for path in sorted((FAMILIES / "flux/presets/19d-38s").glob("*.json")):
        structure = structure_of(load(path))
        found = real(SparseFluxTransformer2DModel, FLUX_DEV, **fields(structure))
        assert {dense_name(name): size for name, size in found.items()} == listed(
            FLUX_DEV, structure
        )


@pytest.mark.parametrize("top_k", [1, 2, 12])
def test_the_ops_formula_is_what_the_sorted_loop_multiplies(top_k):
    tokens, dim, experts, hidden = 40, 32, 12, 8
    shapes = (tokens, dim), (tokens, experts), (experts, dim, hidden), (experts, hidden)
    tensors = [torch.randn(shape) for shape in (*shapes, (experts, hidden, dim))]
    totals = []
    for function in (forward_sorted, torch.ops.d2m.routed_experts):
        with FlopCounterMode(display=False) as counter:
            function(*tensors, top_k)
        totals.append(counter.get_total_flops())
    assert totals == [4 * tokens * top_k * dim * hidden] * 2


@pytest.mark.parametrize("sparse", [False, True])
def test_flops_of_flux_dev_at_its_real_size(sparse):
    """With tensors that have shapes only, at 1024 x 1024 pixels and 512 text tokens."""
    cls = SparseFluxTransformer2DModel if sparse else FluxTransformer2DModel
    with FakeTensorMode():
        model = cls(guidance_embeds=True)
        inputs = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
        }
        total = counted(model, inputs)
    assert flops(FLUX_DEV, Structure(SPEC if sparse else None), 4096, 512) == total


def test_share_of_an_ffn_that_a_token_uses():
    assert used_share(3072, SPEC, FLUX) == 0.375 and used_share(32, None, FLUX) == 1.0
    assert [used_share(128, SparseSpec(top_k=k), FLUX) for k in (0, 12)] == [0.25, 1.0]
