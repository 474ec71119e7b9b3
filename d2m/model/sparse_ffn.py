"""The modules that take a dense FFN's place: one shared expert, routed experts and their router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2m.families.site import up_rows
from d2m.model.experts_op import experts_op
from d2m.model.routing import Gate, activate


class SharedExpert(nn.Module):
    """The expert every token uses: an ordinary FFN [.., D] -> [.., O].

    A gated one's fc1 has the gates' rows before the values'.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        dim: int,
        hidden: int,
        out_dim: int,
        dtype=None,
        device=None,
        activation: str = "gelu_tanh",
        bias: bool = True,
    ):
        super().__init__()
        self.activation = activation
        rows, kind = hidden * up_rows(activation), {"dtype": dtype, "device": device}
        self.fc1 = nn.Linear(dim, rows, bias, **kind)
        self.fc2 = nn.Linear(hidden, out_dim, bias, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.activation))


class Experts(nn.Module):
    """The normal experts, weights matmul-ready: x [T, D], logits [T, E], top_k -> [T, D].

    b1 is None where the FFN has no biases.
    """

    b1: nn.Parameter | None

    def __init__(  # type: ignore[no-untyped-def]
        self,
        dim: int,
        experts: int,
        hidden: int,
        out_dim: int,
        dtype=None,
        device=None,
        activation: str = "gelu_tanh",
        bias: bool = True,
    ):
        super().__init__()
        self.activation = activation
        rows, kind = hidden * up_rows(activation), {"dtype": dtype, "device": device}
        self.w1 = nn.Parameter(torch.empty(experts, dim, rows, **kind))
        self.register_parameter(
            "b1", nn.Parameter(torch.empty(experts, rows, **kind)) if bias else None
        )
        self.w2 = nn.Parameter(torch.empty(experts, hidden, out_dim, **kind))
        nn.init.normal_(self.w1, std=dim**-0.5)
        if self.b1 is not None:
            nn.init.zeros_(self.b1)
        nn.init.normal_(self.w2, std=hidden**-0.5)

    def forward(self, x: Tensor, logits: Tensor, top_k: int) -> Tensor:
        return experts_op(x, logits, self.w1, self.b1, self.w2, top_k, self.activation)


class SparseFFN(nn.Module):
    """A dense FFN split into one shared expert and E routed ones: [.., D] -> [.., D].

    Args: dim D, shared_hidden S, experts E, expert_hidden H, top_k K in 0..E (0: shared only).
    out_dim must equal dim where the op is used (it sums into x's width). activation: one of
    d2m.families.site.ACTIVATIONS; bias: whether both layers have biases.
    Attributes: `top_k` may be changed at any time; `record = True` keeps the router's logits of
    the last call, [.., E] with their graph, in `last_logits` (None where K = 0). `renormalise`
    makes the K gates sum to K / E for every token (a baseline; the paper's gates are as softmax
    leaves them): with K = E the two are the same.
    Buffer `neurons` [S + E*H] int64: the dense FFN's neuron behind every row, shared ones first.
    """

    neurons: Tensor

    def __init__(
        self,
        dim: int,
        shared_hidden: int,
        experts: int,
        expert_hidden: int,
        top_k: int,
        out_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        activation: str = "gelu_tanh",
        bias: bool = True,
    ):
        super().__init__()
        if out_dim not in (None, dim):
            raise ValueError(f"out_dim={out_dim} is not supported; expected None or dim={dim}.")
        if not 0 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} is out of range; expected 0 to {experts}.")
        self.top_k = top_k
        self.num_experts = experts
        self.record = False
        self.renormalise = False
        self.last_logits: Tensor | None = None
        kind = (dtype, device, activation, bias)
        self.shared = SharedExpert(dim, shared_hidden, dim, *kind)
        self.gate = Gate(dim, experts, dtype, device)
        self.experts = Experts(dim, experts, expert_hidden, dim, *kind)
        rows = torch.arange(shared_hidden + experts * expert_hidden, device=device)
        self.register_buffer("neurons", rows)

    def router_logits(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., E] in float32 (float64 for float64 x), autocast or not."""
        return self.gate(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x)
        if self.top_k == 0:
            self.last_logits = None
            return y
        logits = self.router_logits(x)
        if self.record:
            self.last_logits = logits
        if self.renormalise:  # the op's softmax over the chosen alone
            kept, chosen = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, chosen, kept)
        routed = self.experts(
            x.reshape(-1, x.shape[-1]), logits.reshape(-1, self.num_experts), self.top_k
        )
        routed = routed.reshape(y.shape)
        return y + (routed * (self.top_k / self.num_experts) if self.renormalise else routed)

    def extra_repr(self) -> str:
        own = self.experts.activation
        return f"top_k={self.top_k}" + ("" if own == "gelu_tanh" else f", activation={own}")


class AttentionPlusFFN(nn.Module):
    """`proj_out` of a sparse single-stream block: cat[attention, FFN] [.., 2D] -> [.., D].

    The dense one is a linear map of cat[attention, hidden]; its FFN half and its bias have moved
    into the block's SparseFFN, so what remains is a projection of the attention and a sum.
    """

    def __init__(self, dim: int, dtype=None, device=None, out_dim: int | None = None):  # type: ignore[no-untyped-def]
        super().__init__()
        self.linear = nn.Linear(dim, out_dim or dim, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        dim = self.linear.in_features
        return self.linear(x[..., :dim]) + x[..., dim:]


class ProjectionBesideFFN(nn.Module):
    """`to_qkv_mlp_proj` of a sparse FLUX.2 single block: [.., D] -> cat[q, k, v, FFN] [.., 3A + D].

    The dense one is a linear map to q, k, v and the FFN's gates and values; the FFN is whole here,
    and the block's `to_out` an AttentionPlusFFN.
    """

    def __init__(self, linear: nn.Linear, ffn: SparseFFN):
        super().__init__()
        self.linear, self.ffn = linear, ffn

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(x), self.ffn(x)], dim=-1)
