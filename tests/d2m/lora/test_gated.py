"""A dense LoRA on blocks with gated FFNs: what merging before the conversion would have given."""

import pytest
import torch

from d2m.lora.file import LowRank
from d2m.lora.fuse import shares_of, with_changes
from d2m.lora.parts import parts_of
from d2m.model.surgery import convert_state_dict, sparsify, unit_gates
from d2m.shards import open_shards, write_shard
from tests.cases.gated_blocks import CASES, SPEC, answers, converted, layers, relative
from tests.tiny.lora import factors


@pytest.mark.parametrize("case", CASES)
def test_fusing_after_is_fusing_before(case, tmp_path):
    """Every Linear has a change; in float64, by tensors and by what the blocks answer."""
    dense, _, values, given, family, orders = converted(case)
    write_shard(tmp_path / "diffusion_pytorch_model.safetensors", values)
    shards = open_shards(tmp_path)
    found = {name: LowRank(up, down, 0.5) for name, (up, down) in factors(dense, 3).items()}
    parts = {name: parts_of(name, {}, shards, family) for name in found}
    fused = with_changes(values, found, parts, 0.8)
    shares = shares_of(found, parts)
    assert sum(shares.values()) == pytest.approx(1) and shares["routed"] > 0.2
    assert ("attention" in shares) and "nowhere" not in shares
    with torch.no_grad():
        for name, change in found.items():
            weight = dense.get_submodule(name).weight
            weight += 0.8 * 0.5 * change.up.double() @ change.down.double()
    merged = convert_state_dict(dense.state_dict(), orders, SPEC, family)
    assert set(fused) == set(merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-12, atol=1e-12)
    make, bias, _ = CASES[case]
    sparse = sparsify(layers(make, bias, 1), SPEC, family)
    sparse.load_state_dict(fused)
    with torch.no_grad(), unit_gates(sparse):
        for before, after in zip(dense.layers, sparse.layers):
            for one, other in zip(answers(after, given), answers(before, given), strict=True):
                assert relative(one, other) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_parts_are_all_rows_and_columns_once(case, tmp_path):
    dense, _, values, _, family, _ = converted(case)
    write_shard(tmp_path / "diffusion_pytorch_model.safetensors", values)
    shards = open_shards(tmp_path)
    for name, module in dense.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        seen = torch.zeros_like(module.weight)
        for part in parts_of(name, {}, shards, family):
            rows = slice(None) if part.rows is None else part.rows
            columns = slice(None) if part.columns is None else part.columns
            if part.rows is None:
                seen[:, columns] += 1
            else:
                seen[rows] += 1
        assert bool((seen == 1).all()), name
