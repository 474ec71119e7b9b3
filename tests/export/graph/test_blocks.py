"""Every block type against torch, each number of experts, sizes that the trace never saw."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import export.graph.blocks
from export.families.flux import FLUX
from export.graph.blocks import transformer_program
from export.graph.prepare import prepare
from export.graph.trace import EXAMPLE, OUT, Spec
from export.op.schema import DOMAIN, OP
from tests.tiny.bundle import manifest_of, relative, run_block
from tests.tiny.pipeline import tiny_inputs, tiny_transformer

SIZES = ((1, 16, 8), (3, 25, 7), (2, 1, 1))  # batch, image tokens, text tokens


@pytest.fixture(scope="module")
def sparse(tiny_sparse_dir: Path) -> nn.Module:
    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel

    return SparseFluxTransformer2DModel.from_pretrained(tiny_sparse_dir / "transformer").eval()


def watch(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[dict, tuple]]:
    """prefix -> what each block read and wrote in one forward pass."""
    seen: dict[str, tuple[dict, tuple]] = {}
    names = {
        module: name + "."
        for name, module in model.named_modules()
        if type(module).__name__.endswith("TransformerBlock")
    }

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        cos, sin = kwargs["image_rotary_emb"]
        read = {n: kwargs[n] for n in ("hidden_states", "encoder_hidden_states", "temb")}
        read |= {"rope_cos": cos, "rope_sin": sin}
        seen[names[module]] = ({n: t.numpy() for n, t in read.items()}, output)

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in names]
    with torch.no_grad():
        sample = model(**inputs).sample
    for handle in handles:
        handle.remove()
    last = seen[list(names.values())[-1]]
    closing = {"hidden_states": last[1][1].numpy(), "temb": last[0]["temb"]}
    seen["final"] = (closing, (sample,))
    first = next(iter(seen.values()))[0]
    outer = {n: t.numpy() for n, t in inputs.items() if not n.endswith("_ids")}
    opened = [first[n] for n in ("hidden_states", "encoder_hidden_states", "temb")]
    seen["embed"] = (outer, tuple(torch.from_numpy(t) for t in opened))
    return seen


@pytest.mark.parametrize("top_k", [0, 1, 2, 4])
def test_sparse_blocks_are_torch(sparse: nn.Module, tiny_bundle: Path, top_k: int) -> None:
    from d2m.model.surgery import set_top_k

    set_top_k(sparse, top_k)
    record = manifest_of(tiny_bundle)["components"]["transformer"]
    for batch, image, text in SIZES:
        inputs = tiny_inputs(batch, batch=batch, image_tokens=image, text_tokens=text)
        seen = watch(sparse, inputs)
        for call in record["program"]:
            kind, prefix = call["type"], call["prefix"]
            key = str(top_k) if "" not in record["types"][kind]["graphs"] else ""
            read, written = seen[prefix or kind]
            found = run_block(tiny_bundle, "transformer", kind, key, prefix, read)
            for name, a, b in zip(record["types"][kind]["outputs"], found, written, strict=True):
                assert relative(a, b) < 2e-6, (kind, prefix, name, (batch, image, text))


def test_dense_blocks_are_torch(tiny_dense_dir: Path, tiny_dense_bundle: Path) -> None:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(tiny_dense_dir / "transformer").eval()
    manifest = manifest_of(tiny_dense_bundle)
    assert manifest["kind"] == "dense" and manifest["top_k_choices"] == []
    record = manifest["components"]["transformer"]
    assert set(record["types"]) == {"embed", "double", "single", "final"}
    seen = watch(model, tiny_inputs(0, batch=3, image_tokens=9, text_tokens=5))
    for call in record["program"]:
        kind, prefix = call["type"], call["prefix"]
        read, written = seen[prefix or kind]
        found = run_block(tiny_dense_bundle, "transformer", kind, "", prefix, read)
        assert all(relative(a, b) < 2e-6 for a, b in zip(found, written, strict=True))


def test_graphs_keep_the_rules(tiny_bundle: Path) -> None:
    """Weights are inputs, Linears matmul-ready, one body, names and dimensions of the manifest."""
    row = manifest_of(tiny_bundle)["components"]["transformer"]["types"]["double"]
    assert row["body"] == "either" and sorted(row["graphs"]) == ["0", "1", "2", "4"]
    assert row["weights"]["attn.to_qkv.weight"] == {"dtype": "float32", "shape": [32, 96]}
    assert row["weights"]["ff.gate.weight"] == {"dtype": "float32", "shape": [32, 12]}
    assert not any(name.endswith(("to_q.weight", "neurons")) for name in row["weights"])
    for key, path in row["graphs"].items():
        model = onnx.load(str(tiny_bundle / path))
        onnx.checker.check_model(model, full_check=True)
        graph = model.graph
        assert sum(tensor.ByteSize() for tensor in graph.initializer) < 4096
        matrices = {value.name for value in graph.input if len(dims(value)) == 2}
        transposed = [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in matrices]
        assert not transposed
        assert dims(graph.input[0]) == ["batch", "image_tokens", 32]
        assert [dims(value) for value in graph.output] == [
            ["batch", "text_tokens", 32],
            ["batch", "image_tokens", 32],
        ]
        routed = [n for n in graph.node if (n.domain, n.op_type) == (DOMAIN, OP)]
        assert [n.attribute[0].i for n in routed] == ([int(key)] * 2 if key != "0" else [])
        assert [f.name for f in model.functions] == ([OP] if key != "0" else [])
        text = model.SerializeToString()
        assert b"/" + b"work" not in text and b".py" not in text  # no paths of this machine


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_types_are_found_by_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two single blocks of unequal width are two types; equal blocks share one."""
    model = tiny_transformer(num_single_layers=3)
    odd = model.single_transformer_blocks[1]
    odd.proj_mlp, odd.proj_out = nn.Linear(32, 96), nn.Linear(32 + 96, 32)
    traced = []

    def trace(module: nn.Module, call: object, inputs: dict, outputs: dict, dtype: object):
        traced.append(module)
        graph = onnx.helper.make_graph([], "g", [], [])
        return onnx.helper.make_model(graph)

    monkeypatch.setattr(export.graph.blocks, "trace", trace)
    program = transformer_program(prepare(model, FLUX.tracing), FLUX.tracing, torch.float32)
    assert [kind for kind, _ in program.calls] == [
        "embed", "double", "double", "single", "single_2", "single", "final",
    ]  # fmt: skip
    assert program.calls[4] == ("single_2", "single_transformer_blocks.1.")
    assert len(traced) == len(program.types) == 5
    assert program.types["single_2"].weights["proj_mlp.weight"].shape == (32, 96)


def test_examples_are_told_apart() -> None:
    """Equal example sizes would let the tracer take one dimension for another."""
    assert EXAMPLE["tokens"] == EXAMPLE["image_tokens"] + EXAMPLE["text_tokens"]
    assert len(set(EXAMPLE.values())) == len(EXAMPLE)
    assert Spec(torch.float16, ("batch", 3)).json() == {"dtype": "float16", "shape": ["batch", 3]}
    assert OUT == "out_"


@pytest.mark.slow
def test_half_precision_keeps_the_router_in_float(sparse: nn.Module) -> None:
    """A float16 block: half weights, float32 gate, the values of torch within half's precision."""
    import copy

    from export.families.flux import ROWS, environment
    from export.graph.blocks import block_type
    from tests.tiny.bundle import session

    model = copy.deepcopy(sparse)
    state = {n: p.detach() for n, p in prepare(model, FLUX.tracing).named_parameters()}
    _, inner, _ = environment(model, torch.float16)
    row = ROWS["FluxSingleTransformerBlock"]
    read, written = ({n: inner[n] for n in side} for side in (row.inputs, row.outputs))
    block = model.single_transformer_blocks[0]
    kind = block_type("single", block, row.call, read, written, torch.float16, (2,))
    inputs, outputs = watch(sparse, tiny_inputs(0))["single_transformer_blocks.0."]
    feed = {n: t if n.startswith("rope") else t.astype("f2") for n, t in inputs.items()}
    for name, spec in kind.weights.items():
        tensor = state["single_transformer_blocks.0." + name]
        tensor = tensor.t() if name in kind.linears else tensor
        feed[name] = np.ascontiguousarray(tensor.numpy(), spec.json()["dtype"])
    assert feed["proj_mlp.gate.weight"].dtype == np.float32
    assert feed["proj_mlp.experts.w1"].dtype == np.float16
    found = session(kind.graphs["2"]).run(None, feed)
    for a, b in zip(found, outputs, strict=True):
        assert a.dtype == np.float16 and relative(a, b) < 1e-2
