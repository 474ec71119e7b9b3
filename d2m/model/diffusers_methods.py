"""What diffusers' users do with a model beside calling it, done rightly on a sparse one.

Loading with device maps, storage in fp8, caches between steps, LoRA adapters by peft. What cannot
be done is refused in one sentence: diffusers would leave out what it does not find.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2m.families import family_of_model
from d2m.model.block_group import BlockGroup, SkippedBlock, block_groups
from d2m.model.grouping import renamed
from d2m.model.routing import Gate
from d2m.model.sparse_ffn import AttentionPlusFFN, Experts
from d2m.model.surgery import sparse_ffns
from d2m.recipe.structure import blocks_from

# Caches that look at whole blocks; the others keep tensors by place in the batch from step to step,
# while a group's router gives every block other samples at every step.
WHOLE_BLOCKS = ("FirstBlockCacheConfig", "MagCacheConfig")
# Where diffusers finds a LoRA: the arguments of load_lora_adapter that say so.
FETCHED = (
    "weight_name use_safetensors local_files_only cache_dir force_download proxies token revision"
    " subfolder metadata"
).split()


FUSE = "fuse it instead, with: d2m lora LORA.safetensors SPARSE -o NEW"


class Twin(type):
    """The class of a sparse class: `==` with the dense class holds, by value and not as a key.

    `Pipeline.from_pipe` of diffusers hands a transformer on if its type is in the new pipeline's
    type hints, with `in`, which leaves subclasses out.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or other in cls.__bases__

    __hash__ = type.__hash__


class Weights(OrderedDict[str, Any]):
    """A state dict; whoever reads the weight of a Linear that experts have replaced is told so.

    FLUX's loader of LoRAs does, before it asks the model. Pickled it is an OrderedDict.
    """

    def __missing__(self, key: str) -> Any:
        name = key.removesuffix(".weight")
        if f"{name}.neurons" in self or f"{name}.linear.weight" in self:
            raise ValueError(
                f"{name} is no Linear of the sparse model: experts have taken its place, so a LoRA "
                f"on it cannot be loaded; {FUSE}"
            )
        raise KeyError(key)

    def __reduce__(self) -> Any:
        return (OrderedDict, *super().__reduce__()[1:])


class SparseModel:
    """Methods of diffusers' ModelMixin, before the dense class in the order of the bases."""

    def state_dict(self, *args: Any, **given: Any) -> Any:
        """As torch's, in Weights."""
        if not args and given.get("destination") is None:
            given["destination"] = Weights()
            given["destination"]._metadata = OrderedDict()
        return super().state_dict(*args, **given)  # type: ignore[misc]

    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **given: Any) -> Any:
        """As diffusers', but tables of neurons stay in memory: accelerate offloads no buffers."""
        if given.get("device_map") is not None:
            tables = dict.fromkeys((f"{name}.neurons" for name in sparse_ffns(model)), "cpu")
            given["device_map"] = dict(given["device_map"]) | tables
        return super()._load_pretrained_model(model, *args, **given)  # type: ignore[misc]

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        *args: Any,
        **given: Any,
    ) -> None:
        """As diffusers', for experts too: it finds Linears and convolutions alone."""
        from diffusers.hooks import apply_layerwise_casting

        compute_dtype = compute_dtype or self.dtype  # type: ignore[attr-defined]
        super().enable_layerwise_casting(storage_dtype, compute_dtype, *args, **given)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, Experts):
                apply_layerwise_casting(module, storage_dtype, compute_dtype, None)

    def enable_cache(self, config: Any) -> None:
        """As diffusers'. ValueError where groups of blocks make a cache's answers wrong."""
        if block_groups(self):  # type: ignore[arg-type]
            from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

            if type(config).__name__ not in WHOLE_BLOCKS:
                raise ValueError(
                    f"{type(config).__name__} keeps tensors of blocks from step to step, but this "
                    "model's groups run other blocks for every sample and step; expected one of "
                    f"{', '.join(WHOLE_BLOCKS)}."
                )
            for kind in (BlockGroup, SkippedBlock):
                TransformerBlockRegistry.register(kind, TransformerBlockMetadata(1, 0))
        super().enable_cache(config)  # type: ignore[misc]

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """As diffusers', of peft's config.

        "all-linear" are all Linears but gates and routers, and a target that is a single-stream
        block's `proj_out` is the Linear in it. ValueError for a target that experts have replaced.
        """
        wanted = adapter_config.target_modules
        modules = dict(self.named_modules())  # type: ignore[attr-defined]
        if wanted == "all-linear":
            linears = (n for n, m in modules.items() if isinstance(m, nn.Linear))
            chosen = {name for name in linears if not isinstance(modules[name], Gate)}
        elif not isinstance(wanted, list | set | tuple):
            return super().add_adapter(adapter_config, adapter_name)  # type: ignore[misc]
        else:
            ends = tuple(f".{each}" for each in wanted)
            chosen = {name for name in modules if f".{name}".endswith(ends)}
        if gone := [name for name in chosen if name in sparse_ffns(self)]:  # type: ignore[arg-type]
            raise ValueError(
                f"the target {gone[0].rpartition('.')[2]} is no Linear in this model: experts have "
                'taken its place; expected target_modules such as "shared.fc1" and "shared.fc2", '
                'or target_parameters such as "experts.w1".'
            )
        wrapped = {n for n, m in modules.items() if isinstance(m, AttentionPlusFFN)}
        adapter_config = copy.copy(adapter_config)
        # Full names; the last layer's `proj_out` ends those of blocks, which are no Linears, too.
        chosen = {f"{name}.linear" if name in wrapped else name for name in chosen}
        adapter_config.target_modules = chosen or wanted  # where there is none, peft says so
        if not isinstance(adapter_config.exclude_modules, str):
            adapter_config.exclude_modules = wrapped | set(adapter_config.exclude_modules or ())
        super().add_adapter(adapter_config, adapter_name)  # type: ignore[misc]

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        **given: Any,
    ) -> None:
        """As diffusers', of a LoRA made on this model, or on the dense one outside its FFNs.

        ValueError, with the command that works, if any of its layers has no Linear here.
        """
        from diffusers.loaders.lora_base import _fetch_state_dict

        told = {name: given.pop(name, None) for name in FETCHED}
        agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
        state, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict, user_agent=agent, allow_pickle=False, **told
        )
        start = f"{prefix}." if prefix else ""
        layers = {key.partition(".lora_")[0] for key in state if ".lora_" in key}
        places = linears_of(self, {n.removeprefix(start) for n in layers if n.startswith(start)})  # type: ignore[arg-type]

        def placed(key: str) -> str:
            name, mark, rest = key.removeprefix(start).partition(".lora_")
            mark = mark or (".alpha" if name.endswith(".alpha") else "")
            name = name.removesuffix(".alpha")
            return f"{start}{places.get(name, name)}{mark}{rest}"

        state = {placed(key) if key.startswith(start) else key: each for key, each in state.items()}
        if alphas := given.get("network_alphas"):
            given["network_alphas"] = {placed(key): alpha for key, alpha in alphas.items()}
        if metadata:
            metadata = {key: _renamed(each, places) for key, each in metadata.items()}
        super().load_lora_adapter(state, prefix, metadata=metadata, **given)  # type: ignore[misc]


def linears_of(model: nn.Module, names: set[str]) -> dict[str, str]:
    """Names of Linears, the dense model's or this one's -> this model's.

    ValueError, in one sentence, if it has no such Linear.
    """
    config: Mapping[str, Any] = model.config  # type: ignore[assignment]
    fields = {key: config[key] or {} for key in ("groups", "drop")}
    blocks, family = blocks_from(fields, "the config's blocks"), family_of_model(model)
    # By what Linears have, and those that peft has put an adapter around.
    known = {name for name, module in model.named_modules() if hasattr(module, "in_features")}
    found = {}
    for name in names:
        homes: dict[str, Tensor] = (
            {} if name in known else renamed({name: torch.empty(0)}, blocks, family)
        )
        found[name] = next(iter(homes), name)
    lost = sorted(name for name, home in found.items() if home not in known)
    if lost:
        raise ValueError(
            f"{len(lost)} of the {len(names)} layers that this LoRA changes are no Linears of the "
            f"sparse model (the first is {lost[0]}): experts have taken their place, or blocks "
            f"were dropped; {FUSE}"
        )
    return found


def _renamed(value: Any, places: Mapping[str, str]) -> Any:
    """Layers' names in a list, or as a dict's keys (with peft's ^ before them), under new ones."""
    if isinstance(value, dict):
        return {
            "^" * key.startswith("^")
            + places.get(key.removeprefix("^"), key.removeprefix("^")): each
            for key, each in value.items()
        }
    if isinstance(value, list | set | tuple):
        return [places.get(each, each) for each in value]
    return value
