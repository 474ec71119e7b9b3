"""A sparse model as diffusers' users treat models: offloaded, cast, cached, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m.families import FAMILIES as ROWS
from d2m.families import FLUX
from d2m.families.ffn_sites import sites_of
from d2m.model.block_group import block_groups, set_kappa
from d2m.model.experts_op import experts_op
from d2m.model.grouping import dense_name
from d2m.model.sparse_transformer import SparseFluxTransformer2DModel, sparse_class
from d2m.model.surgery import sparse_ffns
from tests.tiny.families import FAMILIES
from tests.tiny.lora import factors, fused, peft, write
from tests.tiny.pair import grouped_pair
from tests.tiny.pipeline import (
    TRANSFORMER_CONFIG,
    build_pipeline,
    randomize,
    tiny_inputs,
    tiny_transformer,
)

GROUPS: dict[str, Any] = {"groups": {"double": [[0, 1]], "single": [[0, 1]]}}
pytestmark = pytest.mark.filterwarnings("ignore")


def sparse(**fields: Any) -> Any:
    """A model with groups and shared modulation, and tables of neurons that are not in order."""
    config = TRANSFORMER_CONFIG | GROUPS | {"adaln": "single"} | fields
    model = randomize(SparseFluxTransformer2DModel(**config), 5).eval()
    for ffn in sparse_ffns(model).values():
        ffn.neurons.copy_(ffn.neurons.flip(0))
    return model


def output(model: Any, batch: int = 2) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(batch=batch)).sample


# ---------------------------------------------------------------- offloading


def cpu(model: Any, folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"), offload_buffers=True)


def disk(model: Any, folder: Path) -> Any:
    from accelerate import disk_offload

    return disk_offload(model, folder / "off", torch.device("cpu"))


def grouped(level: str, on_disk: bool) -> Any:
    def offload(model: Any, folder: Path) -> Any:
        place = torch.device("cpu")
        where = {"offload_to_disk_path": str(folder / "off")} if on_disk else {}
        model.enable_group_offload(place, place, level, 1, **where)
        return model

    return offload


def mapped(device_map: Any) -> Any:
    def load(model: Any, folder: Path) -> Any:
        model.save_pretrained(folder / "model", max_shard_size="100KB")
        little = {"cpu": 400_000} if isinstance(device_map, str) else None
        loaded = type(model).from_pretrained(
            folder / "model",
            device_map=device_map,
            max_memory=little,
            offload_folder=folder / "off",
        )
        assert "disk" in loaded.hf_device_map.values()
        for name, table in loaded.named_buffers():
            if name.endswith("neurons"):
                assert torch.equal(table, model.get_buffer(name))
        return loaded

    return load


WAYS = {
    "cpu": cpu,
    "disk": disk,
    "leaf": grouped("leaf_level", False),
    "leaf on disk": grouped("leaf_level", True),
    "block": grouped("block_level", False),
    "block on disk": grouped("block_level", True),
    "auto": mapped("auto"),
    "balanced": mapped("balanced"),
    "sequential": mapped("sequential"),
    "all on disk": mapped({"": "disk"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_transformer, sparse])
def test_offloaded_it_is_the_same(way: str, make: Any, tmp_path: Path) -> None:
    expected = output(make())
    model = WAYS[way](make(), tmp_path)
    for _ in range(2):  # the second call takes up what the first has put away
        torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)


def test_fp8_storage_reaches_the_experts() -> None:
    errors = []
    for make, least in ((tiny_transformer, 0.7), (sparse, 0.9)):
        expected, model = output(make()), make()
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        stored = [p.numel() for p in model.parameters() if p.dtype == torch.float8_e4m3fn]
        assert sum(stored) / sum(p.numel() for p in model.parameters()) > least
        errors.append(float((output(model) - expected).norm() / expected.norm()))
    assert all(ffn.gate.weight.dtype == torch.float32 for ffn in sparse_ffns(model).values())
    assert errors[1] < 2 * errors[0] < 0.2


def test_the_op_refuses_weights_that_are_elsewhere() -> None:
    x, logits = torch.ones(3, 4), torch.ones(3, 2)
    weights = [torch.ones(size, device="meta") for size in ((2, 4, 5), (2, 5), (2, 5, 4))]
    with pytest.raises(ValueError, match="got x on cpu, .* w1 on meta, .* expected one device"):
        experts_op(x, logits, *weights, 1)
    assert torch.ops.d2m.routed_experts(x.to("meta"), logits.to("meta"), *weights, 1).is_meta


# ---------------------------------------------------------------- configs, pipelines, caches


@pytest.mark.parametrize("name", list(FAMILIES))
def test_from_config_makes_the_same_model(name: str) -> None:
    tiny = FAMILIES[name]
    family = next(row for row in ROWS if row.names.name == tiny.family)
    dense = tiny.build().transformer
    config = {key: value for key, value in dense.config.items() if not key.startswith("_")}
    cls = sparse_class(family)
    with torch.device("meta"):
        model = cls(**config, top_k=3)
        again = cls.from_config(model.config)
    shapes = [{n: p.shape for n, p in each.named_parameters()} for each in (model, again)]
    assert shapes[0] == shapes[1] and again.config.top_k == 3
    assert again.config == model.config


def test_a_pipeline_hands_it_on() -> None:
    from diffusers import FluxImg2ImgPipeline, FluxTransformer2DModel

    pipe = build_pipeline()
    pipe.register_modules(transformer=sparse())
    assert FluxImg2ImgPipeline.from_pipe(pipe).transformer is pipe.transformer
    twins = {FluxTransformer2DModel: "dense", SparseFluxTransformer2DModel: "sparse"}
    assert twins[SparseFluxTransformer2DModel] == "sparse"  # two keys


def test_caches_between_steps() -> None:
    from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    model = sparse()
    for config in (FasterCacheConfig(), PyramidAttentionBroadcastConfig()):
        with pytest.raises(ValueError, match="Config keeps tensors .* expected one of FirstBlock"):
            model.enable_cache(config)
    expected = output(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    with model.cache_context("test"):
        assert torch.equal(output(model), expected)  # below no threshold: all of it runs
    model.disable_cache()
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.cache_context("test"):
        assert torch.equal(output(model), expected) and torch.equal(output(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [1, 2])
def test_groups_compile_whole(kappa: int) -> None:
    student, _ = grouped_pair(3)
    set_kappa(student, kappa)
    for batch in (1, 3):
        torch._dynamo.reset()
        compiled = torch.compile(student, fullgraph=True, backend="eager")
        torch.testing.assert_close(output(compiled, batch), output(student, batch))


# ---------------------------------------------------------------- adapters


def with_lora(model: Any, file: Path) -> Any:
    pipe = build_pipeline()
    pipe.register_modules(transformer=model)
    pipe.load_lora_weights(file)
    return model


@pytest.mark.parametrize("fields", [{"groups": None}, GROUPS])
def test_a_dense_lora_of_attention_loads_whole(fields: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found = {n: f for n, f in factors(tiny_transformer()).items() if ".attn." in n}
    file = write(tmp_path / "a.safetensors", peft(found))
    names = {dense_name(name): name for name, _ in sparse(**fields).named_modules()}
    changed = fused(sparse(**fields), {names[name]: each for name, each in found.items()})
    actual = output(with_lora(sparse(**fields), file))
    torch.testing.assert_close(actual, output(changed), rtol=1e-4, atol=1e-4)
    assert float((actual - output(sparse(**fields))).abs().max()) > 1e-2


@pytest.mark.parametrize("fields", [{"groups": None}, GROUPS])
def test_a_lora_of_ffns_is_refused_with_the_command(fields: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = write(tmp_path / "a.safetensors", peft(factors(tiny_transformer())))
    for model in (sparse(**fields), sparse(**fields)):
        with pytest.raises(
            ValueError, match=r"no Linears? of .*: d2m lora LORA.safetensors SPARSE"
        ):
            with_lora(model, file)
    sites = {name for name, _, _ in sites_of(tiny_transformer().state_dict(), FLUX)}
    assert not any("lora" in name for name, _ in model.named_modules()) and sites


@pytest.mark.parametrize("fields", [{"groups": None}, GROUPS])
@pytest.mark.parametrize("targets", ["all-linear", ["to_q", "proj_out"]])
def test_an_adapter_made_on_it_loads_again(fields: Any, targets: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("peft")
    model = sparse(**fields)
    before = output(model)
    config = library.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    model.add_adapter(config)
    expected = output(model)
    assert float((expected - before).abs().max()) > 1e-2
    assert not any(
        "lora" in name and ("gate" in name or "router" in name) for name, _ in model.named_modules()
    )
    build_pipeline().save_lora_weights(
        tmp_path, transformer_lora_layers=library.utils.get_peft_model_state_dict(model)
    )
    again = with_lora(sparse(**fields), tmp_path)
    torch.testing.assert_close(output(again), expected)
    assert bool(block_groups(again)) == bool(fields["groups"])


def test_a_target_that_experts_replaced_is_named() -> None:
    library = pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match="proj_mlp is no Linear in this model: experts .* expected"
    ):
        sparse().add_adapter(library.LoraConfig(target_modules=["to_q", "proj_mlp"]))
