"""The routed op against its reference and float64, and the modules around it."""

import pytest
import torch

from d2m.model.experts_op import experts_op
from d2m.model.grouped_mm import backward_grouped, forward_grouped
from d2m.model.routing import route, routed_experts_reference
from d2m.model.sparse_ffn import AttentionPlusFFN, SparseFFN

T, D, E, H = 23, 16, 12, 8


def make(tokens=T, dtype=torch.float32, seed=0, skew=0.0, requires_grad=False, sizes=(D, E, H)):
    """Random arguments; `skew` adds to the first expert's logit, so that load is uneven."""
    D, E, H = sizes
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = noise(tokens, E)
    logits[:, 0] += skew
    tensors = [noise(tokens, D), logits, noise(E, D, H) / 4, noise(E, H) / 4, noise(E, H, D) / 3]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [t.to(wide if i == 1 else dtype) for i, t in enumerate(tensors)]
    return [t.requires_grad_(requires_grad) for t in tensors]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def by_hand(x, logits, w1, b1, w2, top_k):
    """The definition once more in scalar loops, sharing nothing with the reference."""
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        gate = torch.exp(logits[t]) / torch.exp(logits[t]).sum()
        ranked = sorted(range(E), key=lambda i: (-gate[i].item(), i))
        for i in ranked[:top_k]:
            u = x[t] @ w1[i] + b1[i]
            gelu = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
            y[t] += gate[i] * (gelu @ w2[i])
    return y


@pytest.mark.parametrize("top_k", [1, 2, 5, 12])
def test_reference_is_the_definition(top_k):
    arguments = make(9, torch.float64)
    expected = by_hand(*arguments, top_k)
    assert relative(routed_experts_reference(*arguments, top_k), expected) < 1e-13


@pytest.mark.parametrize("top_k", range(1, E + 1))
@pytest.mark.parametrize("skew", [0.0, 50.0])
def test_op_matches_reference(top_k, skew):
    arguments = make(seed=top_k, skew=skew)
    expected = routed_experts_reference(*(a.double() for a in arguments), top_k)
    actual = experts_op(*arguments, top_k)
    assert actual.dtype == torch.float32
    assert relative(actual, expected) < 1e-6


@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_any_number_of_tokens(tokens):
    arguments = make(tokens, torch.float64, seed=tokens)
    y = experts_op(*arguments, 2)
    assert y.shape == (tokens, D)
    assert relative(y, routed_experts_reference(*arguments, 2)) < 1e-13


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision(dtype, limit):
    arguments = make(200, dtype)
    y = experts_op(*arguments, 3)
    assert y.dtype == dtype
    assert relative(y, routed_experts_reference(*(a.double() for a in arguments), 3)) < limit


def test_ties_go_to_the_lowest_expert():
    logits = torch.zeros(4, E)
    logits[1, 5:] = 1.0
    assert route(logits, 3)[2].tolist() == [[0, 1, 2], [5, 6, 7], [0, 1, 2], [0, 1, 2]]
    x, _, w1, b1, w2 = make(4, torch.float64)
    expected = by_hand(x, logits.double(), w1, b1, w2, 3)
    assert relative(experts_op(x, logits.double(), w1, b1, w2, 3), expected) < 1e-13


def test_strided_inputs():
    x, logits, w1, b1, w2 = make(40, torch.float64)
    x, logits = x.repeat(1, 2)[::2, :D], logits.T.contiguous().T[::2]
    w2 = w2.transpose(1, 2).contiguous().transpose(1, 2)
    expected = routed_experts_reference(x, logits, w1, b1, w2, 2)
    assert relative(experts_op(x, logits, w1, b1, w2, 2), expected) < 1e-13


@pytest.mark.parametrize("function", [routed_experts_reference, experts_op, forward_grouped])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_an_expert_that_nobody_chose_has_no_say(function, bad):
    x, logits, w1, b1, w2 = make(40)
    logits[:, 5] = -60
    expected = routed_experts_reference(x, logits, w1, b1, w2, 2)
    for held in (w1, b1, w2):
        held[5] = bad
    assert relative(function(x, logits, w1, b1, w2, 2), expected) < 1e-6


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0)])
def test_grouped_mm_takes_weights_of_any_strides(order):
    x, logits, w1, b1, w2 = make(40)
    dy, back = torch.ones(40, D), [order.index(axis) for axis in range(3)]
    strided = [w.permute(order).contiguous().permute(back) for w in (w1, w2)]
    assert strided[1].stride() != w2.stride() and strided[1].equal(w2)
    given = x, logits, strided[0], b1, strided[1], 2
    assert relative(forward_grouped(*given), forward_grouped(x, logits, w1, b1, w2, 2)) < 1e-6
    expected = backward_grouped(dy, x, logits, w1, b1, w2, 2, True, True)
    for one, other in zip(backward_grouped(dy, *given, True, True), expected):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradcheck(top_k):
    arguments = make(4, torch.float64, seed=3, requires_grad=True, sizes=(5, 4, 3))
    assert torch.autograd.gradcheck(lambda *a: experts_op(*a, top_k), arguments)


@pytest.mark.parametrize("skew", [0.0, 50.0])
def test_gradients_match_the_reference(skew):
    results = []
    for function in (experts_op, routed_experts_reference):
        arguments = make(60, torch.float32, seed=7, skew=skew, requires_grad=True)
        function(*arguments, 2).square().sum().backward()
        results.append([a.grad for a in arguments])
    for actual, expected in zip(*results):
        assert relative(actual, expected) < 1e-5


def test_only_the_needed_gradients():
    x, logits, w1, b1, w2 = make(11)
    experts_op(x, logits.requires_grad_(), w1, b1, w2, 2).sum().backward()
    assert logits.grad is not None and x.grad is None and w1.grad is None
    x, logits, w1, b1, w2 = make(11)
    experts_op(x, logits, w1, b1, w2.requires_grad_(), 2).sum().backward()
    assert w2.grad is not None and w1.grad is None and logits.grad is None


@pytest.mark.parametrize("top_k", [1, 3])
def test_opcheck(top_k):
    for requires_grad in (False, True):
        arguments = make(10, requires_grad=requires_grad)
        torch.library.opcheck(torch.ops.d2m.routed_experts.default, (*arguments, top_k))
    arguments = make(10)
    for flags in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.d2m.routed_experts_backward.default,
            (torch.randn(10, D), *arguments, top_k, *flags),
        )


def test_torch_export_keeps_the_op():
    ffn = SparseFFN(D, D, E, D // 4, top_k=2).eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(
        ffn, (torch.randn(1, 7, D),), dynamic_shapes=({1: tokens},), strict=False
    )
    targets = [str(node.target) for node in program.graph.nodes]
    assert "d2m.routed_experts.default" in targets
    x = torch.randn(1, 31, D)
    assert torch.equal(program.module()(x), ffn(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(2, 3, D)}, "flatten"),
        ({1: torch.zeros(T, E + 1)}, "logits"),
        ({4: torch.zeros(E, H, D + 1)}, "w2"),
        ({3: torch.zeros(E, H, dtype=torch.float64)}, "dtype"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    arguments = make()
    for index, tensor in change.items():
        arguments[index] = tensor
    with pytest.raises(ValueError, match=words):
        experts_op(*arguments, 2)


@pytest.mark.parametrize("top_k", [0, 13, -1])
def test_top_k_out_of_range(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k}.*1 to 12"):
        experts_op(*make(), top_k)


def test_sparse_ffn():
    torch.manual_seed(0)
    ffn = SparseFFN(D, D, E, D // 4, top_k=2, dtype=torch.float64)
    names = {name: tuple(tensor.shape) for name, tensor in ffn.state_dict().items()}
    assert names == {
        "neurons": (4 * D,),
        "shared.fc1.weight": (D, D),
        "shared.fc1.bias": (D,),
        "shared.fc2.weight": (D, D),
        "shared.fc2.bias": (D,),
        "gate.weight": (E, D),
        "experts.w1": (E, D, D // 4),
        "experts.b1": (E, D // 4),
        "experts.w2": (E, D // 4, D),
    }
    x = torch.randn(2, 9, D, dtype=torch.float64)
    flat = x.reshape(-1, D)
    e = ffn.experts
    routed = by_hand(flat, flat @ ffn.gate.weight.T, e.w1, e.b1, e.w2, 2).reshape(x.shape)
    assert relative(ffn(x), ffn.shared(x) + routed) < 1e-13
    ffn.top_k = 0
    assert torch.equal(ffn(x), ffn.shared(x))


def test_recording():
    ffn = SparseFFN(D, D, E, D // 4, top_k=2)
    x = torch.randn(2, 9, D)
    ffn(x)
    assert ffn.last_logits is None
    ffn.record = True
    ffn(x)
    assert ffn.last_logits.shape == (2, 9, E) and ffn.last_logits.requires_grad
    ffn.top_k = 0
    ffn(x)
    assert ffn.last_logits is None


def test_gate_stays_float32_in_bfloat16_and_under_autocast():
    ffn = SparseFFN(D, D, E, D // 4, top_k=2, dtype=torch.bfloat16)
    assert ffn.gate.weight.dtype == torch.float32
    ffn.record = True
    assert ffn(torch.randn(3, D, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert ffn.last_logits.dtype == torch.float32
    ffn = SparseFFN(D, D, E, D // 4, top_k=2)
    ffn.record = True
    x = torch.randn(64, D)
    exact, logits = ffn(x), ffn.last_logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ffn(x)
    assert torch.equal(ffn.last_logits, logits)
    assert y.dtype == torch.bfloat16 and relative(y, exact) < 2e-2
    y.float().square().sum().backward()
    for name, parameter in ffn.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


def test_attention_plus_ffn():
    module = AttentionPlusFFN(D)
    attention, ffn = torch.randn(2, 5, D), torch.randn(2, 5, D)
    expected = attention @ module.linear.weight.T + ffn
    assert relative(module(torch.cat([attention, ffn], 2)), expected) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_cuda_matches_float64_on_the_cpu(dtype, limit, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        arguments = make(300, dtype, seed=1)
        wide = torch.float64 if kind == torch.float64 else torch.float32
        arguments = [a.to(device, wide if i == 1 else kind) for i, a in enumerate(arguments)]
        arguments = [a.requires_grad_() for a in arguments]
        y = experts_op(*arguments, 2)
        y.double().square().sum().backward()
        results.append([y.detach().cpu(), *(a.grad.cpu() for a in arguments)])
    for actual, expected in zip(*results):
        assert relative(actual, expected) < limit


def test_renormalised_gates_by_hand():
    """The chosen experts' gates divided by their sum, times K / E; equal to the plain for K = E."""
    ffn = SparseFFN(8, 8, 4, 2, top_k=2, dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ffn.renormalise, ffn.record = True, True
    p, chosen = ffn.router_logits(x).softmax(-1).topk(2)
    gates = p / p.sum(-1, keepdim=True) * 2 / 4
    expected = ffn.shared(x)
    for t in range(5):
        for gate, i in zip(gates[t], chosen[t]):
            w = ffn.experts
            hidden = torch.nn.functional.gelu(x[t] @ w.w1[i] + w.b1[i], approximate="tanh")
            expected = expected.index_add(0, torch.tensor([t]), (gate * (hidden @ w.w2[i]))[None])
    y = ffn(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ffn.last_logits, ffn.router_logits(x))  # balance sees all of them
    y.sum().backward()
    assert torch.isfinite(ffn.gate.weight.grad).all() and ffn.gate.weight.grad.abs().sum() > 0
    ffn.top_k = 4
    every = ffn(x)
    ffn.renormalise = False
    torch.testing.assert_close(every, ffn(x))
