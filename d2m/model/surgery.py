"""Dense to sparse: the structure (modules replaced in place) and the values, kept apart.

Structure runs on the meta device as well; values are pure functions of one FFN's tensors, so that
a model larger than memory can be converted block by block.
Shape letters: D width, N dense hidden neurons, S shared hidden, E experts, H expert hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2m.families import Family, Site, family_of_model
from d2m.families.ffn_sites import DenseFFN, neurons_at, read_ffn, read_rest, sites_of, spec_at
from d2m.families.site import up_rows
from d2m.model.block_group import block_groups, set_kappa
from d2m.model.routing import activate
from d2m.model.sparse_ffn import AttentionPlusFFN, ProjectionBesideFFN, SparseFFN
from d2m.recipe.recipe import SparseSpec, hidden_sizes

GATE_STD = 0.1  # ours: times D^-1/2, so that logits of normalised tokens start at about N(0, .1)


def sparsify(model: nn.Module, spec: SparseSpec, family: Family | None = None) -> nn.Module:
    """Replace every dense FFN of `model` by a SparseFFN, in place; returns the model.

    Only structure: the new weights are random (nothing at all on the meta device). Fill them with
    `convert_state_dict`. ValueError if the ratios do not fit the model's FFNs.
    """
    family = family or family_of_model(model)
    for _, block_name, site in sites_of((n for n, _ in model.named_parameters()), family):
        block = model.get_submodule(block_name)
        ffn = sparse_ffn_for(block, site, spec_at(spec, block_name, family))
        replace_site(block, site, ffn)
    return model


def sparse_ffn_for(block: nn.Module, site: Site, spec: SparseSpec) -> SparseFFN:
    """A SparseFFN of a dense site's sizes, activation and kind, its weights random."""
    fc1, fc2 = linear_at(block, site.fc1), linear_at(block, site.fc2)
    neurons = neurons_at(site, fc1.out_features, fc2.in_features)
    shared, expert = hidden_sizes(neurons, spec)
    ffn = SparseFFN(
        fc1.in_features,
        shared,
        spec.num_experts,
        expert,
        spec.top_k,
        dtype=fc1.weight.dtype,
        device=fc1.weight.device,
        activation=site.activation,
        bias=fc1.bias is not None,
    )
    ffn.renormalise = spec.renormalise
    return ffn


def stored_ffn(
    tensors: Mapping[str, Tensor],
    name: str,
    dense: DenseFFN,
    site: Site,
    spec: SparseSpec,
    dtype: torch.dtype,
) -> SparseFFN:
    """The SparseFFN at a site of a sparse model's tensors, in memory of its own, in `dtype`.

    dense: the FFN it came of, by whose sizes it is made; name: before the tensors' local names.
    """
    shared, hidden = hidden_sizes(dense.neurons, spec)
    with torch.device("meta"):
        ffn = SparseFFN(
            dense.width,
            shared,
            spec.num_experts,
            hidden,
            spec.top_k,
            activation=site.activation,
            bias=dense.fc1_b is not None,
        )
    values = {
        key.removeprefix(f"{name}."): value.to(dtype, copy=True)
        if value.is_floating_point()
        else value.clone()
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }
    ffn.load_state_dict(values, assign=True)
    ffn.renormalise = spec.renormalise
    return ffn


def run_dense(ffn: DenseFFN, x: Tensor, activation: str) -> Tensor:
    """What a dense FFN answers to x [.., D], in its own dtype."""
    between = activate(F.linear(x, ffn.fc1_w, ffn.fc1_b), activation)
    return F.linear(between, ffn.fc2_w, ffn.fc2_b)


def replace_site(block: nn.Module, site: Site, ffn: SparseFFN) -> None:
    """Put a SparseFFN where a dense FFN is, and around it what keeps the block's forward as it is.

    ValueError for an FFN of which one Linear alone has a bias.
    """
    fc1, fc2 = linear_at(block, site.fc1), linear_at(block, site.fc2)
    if (fc1.bias is None) != (fc2.bias is None):
        raise ValueError(
            f"{site.fc1} and {site.fc2} have {'no' if fc1.bias is None else 'a'} and "
            f"{'no' if fc2.bias is None else 'a'} bias; expected both or neither: an FFN like this "
            "is not known."
        )
    dim, kind = fc1.in_features, {"dtype": fc1.weight.dtype, "device": fc1.weight.device}
    neurons = neurons_at(site, fc1.out_features, fc2.in_features)
    if site.before:
        rows = fc1.out_features - neurons * up_rows(site.activation)
        linear = nn.Linear(dim, rows, fc1.bias is not None, **kind)
        place(block, site.fc1, ProjectionBesideFFN(linear, ffn))
    else:
        place(block, site.module, ffn)
    if site.identity:
        place(block, site.identity, nn.Identity())
    if site.rest:
        place(block, site.fc2, AttentionPlusFFN(fc2.in_features - neurons, out_dim=dim, **kind))
    site.answers_width(block, dim)


def linear_at(block: nn.Module, name: str) -> nn.Linear:
    """A Linear of a block by its name, which may have dots."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear), (name, type(module))
    return module


def place(block: nn.Module, name: str, module: nn.Module) -> None:
    """Set a module of a block by its name, which may have dots."""
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, module)


def sparse_ffns(model: nn.Module) -> dict[str, SparseFFN]:
    """Every SparseFFN of the model by its name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseFFN)}


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Make every SparseFFN use `top_k` experts a token; ValueError unless 0 <= top_k <= E."""
    ffns = sparse_ffns(model)
    for ffn in ffns.values():
        if not 0 <= top_k <= ffn.num_experts:
            raise ValueError(
                f"top_k={top_k} is out of range; this model takes 0 to {ffn.num_experts}."
            )
    for ffn in ffns.values():
        ffn.top_k = top_k


@contextmanager
def restored(modules: Iterable[nn.Module], *fields: str) -> Iterator[None]:
    """Within: these fields of the modules may be set; they have their old values afterwards."""
    before = [(module, name, getattr(module, name)) for module in modules for name in fields]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


# ---------------------------------------------------------------- values


def split_neurons(importance: Tensor, shared: int, experts: int) -> Tensor:
    """importance [N] -> permutation [N] int64: dense neuron index of every sparse row.

    The `shared` most important neurons come first, most important first (read); the others are
    dealt to the experts round-robin by rank (ours), so that experts start equally important.
    Equal scores keep their order. ValueError for scores that are no numbers or cannot be dealt.
    """
    rest = importance.numel() - shared
    if importance.ndim != 1 or rest < 0 or rest % experts:
        raise ValueError(
            f"importance has shape {list(importance.shape)}; expected [N] with N - {shared} a "
            f"multiple of {experts}."
        )
    if not torch.isfinite(importance).all():
        raise ValueError(
            "the importance of some neurons is not finite; expected numbers: check the "
            "calibration data and the dense weights for NaN."
        )
    order = torch.argsort(importance.double(), descending=True, stable=True).cpu()
    dealt = order[shared:].view(-1, experts).T.reshape(-1)
    return torch.cat([order[:shared], dealt])


def convert_ffn(ffn: DenseFFN, permutation: Tensor, shared: int, experts: int) -> dict[str, Tensor]:
    """One dense FFN -> a SparseFFN's tensors, all but the gate.

    permutation [N] from `split_neurons`. A gated neuron takes its gate's row and its value's with
    it. The experts' down-projection is scaled by E (ours): with k = E and a uniform gate of 1/E the
    sum is the dense FFN. The output bias is the shared expert's alone.
    """
    fc1_w, fc1_b, fc2_w, fc2_b = ffn
    head, tail = permutation[:shared], permutation[shared:]
    halves = fc1_w.split(ffn.neurons)
    w1 = [half[tail].view(experts, -1, ffn.width).transpose(1, 2) for half in halves]
    w2 = fc2_w[:, tail].T.reshape(experts, -1, fc2_w.shape[0])
    biases = () if fc1_b is None else fc1_b.split(ffn.neurons)
    tensors = {
        "neurons": permutation.clone(),
        "shared.fc1.weight": _joined([half[head] for half in halves], 0),
        "shared.fc1.bias": _joined([half[head] for half in biases], 0),
        "shared.fc2.weight": fc2_w[:, head].contiguous(),
        "shared.fc2.bias": None if fc2_b is None else fc2_b.clone(),
        "experts.w1": _joined(w1, 2),
        "experts.b1": _joined([half[tail].view(experts, -1) for half in biases], 1),
        "experts.w2": w2.contiguous() * experts,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _joined(parts: list[Tensor], axis: int) -> Tensor | None:
    """Gates and values side by side, the one part of an FFN without gates, or None."""
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0].contiguous() if parts else None


def gate_weight(name: str, experts: int, dim: int, seed: int) -> Tensor:
    """The first gate of a site, [E, D] float32: small and random, by seed and site name alone."""
    digest = hashlib.sha256(f"{seed}/gate/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    return torch.randn(experts, dim, generator=generator) * GATE_STD * dim**-0.5


def convert_site(
    dense: Mapping[str, Tensor],
    block: str,
    site: Site,
    permutation: Tensor,
    spec: SparseSpec,
    seed: int = 0,
) -> dict[str, Tensor]:
    """All tensors of the sparse model that come from one FFN site, under their full names."""
    ffn = read_ffn(dense.__getitem__, block, site)
    shared, _ = hidden_sizes(ffn.neurons, spec)
    name = f"{block}.{site.module}"
    tensors = convert_ffn(ffn, permutation, shared, spec.num_experts)
    gate = gate_weight(name, spec.num_experts, ffn.width, seed)
    tensors["gate.weight"] = gate.double() if ffn.fc1_w.dtype == torch.float64 else gate
    result = {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    rest = read_rest(dense.__getitem__, block, site)
    return result | {f"{block}.{key}": tensor.contiguous() for key, tensor in rest.items()}


def convert_state_dict(
    dense: Mapping[str, Tensor],
    permutations: Mapping[str, Tensor],
    spec: SparseSpec,
    family: Family,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A dense transformer's state dict -> the sparse one's. What is no FFN is passed on, uncopied.

    `permutations`: site name -> [N], one for every site; ValueError names a missing one.
    """
    replaced: set[str] = set()
    result: dict[str, Tensor] = {}
    for name, block, site in sites_of(dense, family):
        if name not in permutations:
            raise ValueError(f"no permutation is given for {name}; expected one for every FFN.")
        own = spec_at(spec, block, family)
        result |= convert_site(dense, block, site, permutations[name], own, seed)
        for linear in site.linears:
            replaced |= {f"{block}.{linear}.weight", f"{block}.{linear}.bias"}
    return {key: t for key, t in dense.items() if key not in replaced} | result


# ---------------------------------------------------------------- the identity


@contextmanager
def unit_gates(model: nn.Module) -> Iterator[None]:
    """Within: every expert on with gate 1/E, which the stored scale E makes 1. Restored after.

    All blocks of groups are on too.
    """
    ffns, groups = sparse_ffns(model).values(), block_groups(model).values()
    gates = [ffn.gate.weight.detach().clone() for ffn in ffns]
    with restored(ffns, "top_k"), restored(groups, "kappa"):
        try:
            set_kappa(model, None)
            for ffn in ffns:
                ffn.top_k = ffn.num_experts
                ffn.gate.weight.detach().zero_()
            yield
        finally:
            for ffn, gate in zip(ffns, gates):
                ffn.gate.weight.detach().copy_(gate)


def identity_error(sparse: nn.Module, dense: nn.Module, inputs: Mapping[str, Any]) -> float:
    """Relative error |sparse - dense| / |dense| of the output with all experts on at unit gates.

    Rounding alone right after conversion; run it before training changes the weights.
    """
    predicted = family_of_model(dense).data.predicted
    with torch.no_grad(), unit_gates(sparse):
        answers = (m(**inputs, return_dict=False)[0] for m in (sparse, dense))
        actual, expected = (predicted(answer).double() for answer in answers)
    return float((actual - expected).norm() / expected.norm())
