"""Experts of every activation, with and without biases: what the reference and the op mean.

The reference is held against scalar loops in float64, everything else against the reference: all
realisations of the op in `tests/test_op.py`.
"""

import math

import pytest
import torch

from d2m.families.site import ACTIVATIONS, GATED
from d2m.model.experts_op import experts_op
from d2m.model.routing import activate, activate_backward, routed_experts_reference
from d2m.model.sparse_ffn import SparseFFN
from tests.cases.experts import KINDS, make, relative

T, D, E, H = 23, 16, 12, 8  # the sizes that `make` has by default


def scalar(u, activation):
    """One hidden value by Python's own functions: u is a number, or (gate, value)."""
    if activation in GATED:
        gate, value = u
        own = scalar(gate, "silu" if activation == "swiglu" else "gelu")
        return own * value
    if activation == "silu":
        return u / (1 + math.exp(-u))
    if activation == "gelu":
        return 0.5 * u * (1 + math.erf(u / math.sqrt(2)))
    return 0.5 * u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_the_reference_is_the_definition(activation, bias):
    x, logits, w1, b1, w2 = arguments = make(activation, bias, 5)
    expected = torch.zeros(5, D, dtype=torch.float64)
    for t in range(5):
        gate = torch.exp(logits[t]) / torch.exp(logits[t]).sum()
        ranked = sorted(range(E), key=lambda i: (-gate[i].item(), i))
        for i in ranked[:3]:
            rows = (x[t] @ w1[i] + (0 if b1 is None else b1[i])).tolist()
            each = list(zip(rows[:H], rows[H:])) if activation in GATED else rows
            hidden = torch.tensor([scalar(u, activation) for u in each], dtype=torch.float64)
            expected[t] += gate[i] * (hidden @ w2[i])
    assert relative(routed_experts_reference(*arguments, 3, activation), expected) < 1e-13


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_backward_is_autograds(activation):
    rows = torch.randn(7, 2 * H, dtype=torch.float64, requires_grad=True)
    out = activate(rows, activation)
    dout = torch.randn_like(out)
    out.backward(dout)
    assert relative(activate_backward(dout, rows.detach(), activation), rows.grad) < 1e-13


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_the_op_under_autograd(activation, bias):
    arguments = [
        None if a is None else a.requires_grad_()
        for a in make(activation, bias, 4, seed=3, sizes=(5, 4, 3))
    ]
    given = [a for a in arguments if a is not None]

    def run(*tensors):
        x, logits, w1, *rest = tensors
        return experts_op(x, logits, w1, *(rest if bias else (None, *rest)), 2, activation)

    assert torch.autograd.gradcheck(run, given, eps=1e-6, atol=1e-6)
    torch.library.opcheck(torch.ops.d2m.routed_experts.default, (*arguments, 2, activation))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_few_tokens(tokens, activation):
    made = make(activation, False, tokens)
    arguments = [None if a is None else a.requires_grad_() for a in made]
    y = experts_op(*arguments, 2, activation)
    assert y.shape == (tokens, D)
    assert relative(y, routed_experts_reference(*arguments, 2, activation)) < 1e-13
    y.sum().backward()
    assert arguments[2].grad.shape == arguments[2].shape


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_half_precision_and_autocast(activation):
    arguments = make(activation, False, 200, torch.float32)
    expected = routed_experts_reference(
        *(None if a is None else a.double() for a in arguments), 2, activation
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts_op(*arguments, 2, activation)
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 2e-2


def test_bad_arguments_are_named():
    arguments = make("swiglu", True)
    with pytest.raises(ValueError, match="activation 'relu'; expected one of gelu_tanh, gelu"):
        experts_op(*arguments, 2, "relu")
    with pytest.raises(ValueError, match=r"got w2 of shape \[12, 8, 16\]; expected \[12, 16, 16\]"):
        experts_op(*arguments, 2, "silu")
    odd = [*arguments[:2], arguments[2][..., :7], None, arguments[4]]
    with pytest.raises(ValueError, match="w1 and b1 with 2 H for gates and values"):
        experts_op(*odd, 2, "swiglu")


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_a_module_of_every_kind(activation, bias):
    """With all experts on at unit gates it is one FFN, whose matrices are the parts' joined."""
    torch.manual_seed(0)
    ffn = SparseFFN(D, 12, 4, 3, top_k=4, dtype=torch.float64, activation=activation, bias=bias)
    torch.nn.init.zeros_(ffn.gate.weight)
    names = {name for name, _ in ffn.named_parameters()}
    assert ("experts.b1" in names, "shared.fc2.bias" in names) == (bias, bias)
    assert set(ffn.state_dict()) == names | {"neurons"}
    if bias:
        torch.nn.init.normal_(ffn.experts.b1)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    expected = ffn.shared(x)
    for i in range(4):
        rows = x @ ffn.experts.w1[i] + (ffn.experts.b1[i] if bias else 0)
        expected = expected + activate(rows, activation) @ ffn.experts.w2[i] / 4
    assert relative(ffn(x), expected) < 1e-12
