"""What torch computes, recorded: a diffusers pipeline run once, every part's inputs and outputs.

The pipeline is called as users call it and watched through forward hooks; nothing of diffusers is
rewritten here, so a fault shared by exporter and runtime cannot hide in the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.graph.program import MODULATION

if TYPE_CHECKING:
    from export.families.family import Encoder, Family
    from runtime.bundle.directory import Bundle

Arrays = dict[str, np.ndarray]
STREAMS = {"text": "encoder_hidden_states", "image": "hidden_states"}  # d2m's names, the program's


@dataclass
class Recording:
    """One run. Arrays are float32 (ids int64), names are the bundle's.

    components: name -> (inputs, outputs), the transformer's at the first recorded step.
    blocks: step -> prefix -> (inputs, outputs), "embed" and "final" being all but the blocks. All
    blocks of a group are run on what enters it, chosen or not; its router has the group's prefix.
    logits: step -> site of routed experts -> [tokens, E]. latents: before each step and after the
    last. image: [n, 3, H, W], 0 to 1. conditions: of the prompts, by the names of the
    transformer's inputs; negative: of what they are guided against.
    """

    components: dict[str, tuple[Arrays, Arrays]] = field(default_factory=dict)
    blocks: dict[int, dict[str, tuple[Arrays, Arrays]]] = field(default_factory=dict)
    logits: dict[int, Arrays] = field(default_factory=dict)
    latents: list[np.ndarray] = field(default_factory=list)
    image: np.ndarray = field(default_factory=lambda: np.empty(0))
    conditions: Arrays = field(default_factory=dict)
    negative: Arrays | None = None


def load_reference(
    directory: str | Path, kind: str, top_k: int | None, kappa: int | None = None
) -> Any:
    """The pipeline in float32 on the CPU, which must be of `kind` ("sparse", with `top_k` set).

    `kappa`: blocks that its groups keep, None where it must have none.
    """
    from d2m.generate import load_pipeline
    from d2m.model.block_group import block_groups, set_kappa
    from d2m.model.surgery import set_top_k, sparse_ffns

    pipe = load_pipeline(directory, device="cpu", dtype="fp32")
    found = "sparse" if sparse_ffns(pipe.transformer) else "dense"
    if found != kind:
        raise ValueError(
            f"the pipeline {directory} is {found}, the bundle is {kind}, expected the pipeline"
            " that the bundle was exported from."
        )
    if bool(block_groups(pipe.transformer)) != (kappa is not None):
        raise ValueError(
            f"of the pipeline {directory} and the bundle only one has groups of blocks, expected"
            " the pipeline that the bundle was exported from."
        )
    if top_k is not None:
        set_top_k(pipe.transformer, top_k)
    if kappa is not None:
        set_kappa(pipe.transformer, kappa)
    return pipe


def as_stored(pipe: Any, bundle: Bundle) -> None:
    """Round the pipeline's weights as the bundle stores them.

    `d2m export --storage bf16` of weights trained in float32 rounds them, and says so; parity
    is to find all other errors (ours).
    """
    import torch

    from export.families import FAMILIES

    halves = {"BF16": torch.bfloat16, "F16": torch.float16}
    models = FAMILIES[bundle.manifest["family"]].components
    folders = {model.name: model.folder for model in models if model is not None}
    own = {"transformer", *folders}  # others have the transformer's weights
    for component in own & bundle.manifest["components"].keys():
        stored = bundle.weights(component).tensors
        if not any(row.dtype in halves for row in stored.values()):
            continue
        for name, tensor in getattr(pipe, folders.get(component, component)).named_parameters():
            found = [each for each in (name, *fused(name)) if each in stored]
            row = stored[found[0]] if found else None
            if row is not None and row.dtype in halves:
                tensor.data.copy_(tensor.data.to(halves[row.dtype]))


def fused(name: str) -> list[str]:
    """Names under which export joins what a weight is a part of: query, key and value."""
    parts = {r"\.to_[qkv]\.": ".to_qkv.", r"\.add_[qkv]_proj\.": ".to_added_qkv."}
    parts[r"\.to_[kv]\."] = ".to_kv."  # where the query reads another stream
    return [re.sub(old, new, name) for old, new in parts.items()]


def record(
    pipe: Any,
    prompts: Sequence[str],
    noise: np.ndarray,
    *,
    steps: int,
    guidance: float,
    height: int,
    width: int,
    text_tokens: int,
    recorded: Sequence[int],
) -> Recording:
    """Generate from `noise` [n, ...], recording the parts in the steps `recorded`.

    A family that generates with classifier-free guidance is guided against the empty prompt.
    """
    import torch

    from d2m.families import family_of_pipeline
    from d2m.families.inputs import generate_latents
    from export.families import FAMILIES

    family = family_of_pipeline(pipe)
    row = FAMILIES[family.names.name]
    result = Recording()
    with torch.no_grad():
        with watch_encoders(pipe, row, result):
            conditions = family.data.encode_text(pipe, list(prompts), text_tokens)
        result.conditions = {name: array(tensor) for name, tensor in conditions.items()}
        negative = None
        if family.data.unconditional_of(pipe) and guidance > 1:
            negative = family.data.encode_text(pipe, [""] * len(prompts), text_tokens)
            result.negative = {name: array(tensor) for name, tensor in negative.items()}
        latents = torch.from_numpy(noise)
        result.latents.append(noise)

        def after(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            result.latents.append(array(values["latents"]))
            return values

        with watch_transformer(pipe.transformer, row, result, recorded):
            final = generate_latents(
                pipe,
                latents,
                conditions,
                negative,
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=height,
                width=width,
                max_sequence_length=text_tokens,
                callback_on_step_end=after,
                **row.given(pipe, height, width),
            )
        spatial = row.spatial(pipe, final, height, width)
        image = row.decode(pipe, spatial)
        encoded = row.encode(pipe, image)
    result.components["vae_decoder"] = ({"latents": array(spatial)}, {"image": array(image)})
    result.components["vae_encoder"] = ({"image": array(image)}, {"latents": array(encoded)})
    result.image = to_unit(array(image))
    return result


@contextmanager
def watch_encoders(pipe: Any, row: Family, result: Recording) -> Iterator[None]:
    """Keep the ids that the text encoders get, and what the pipeline takes from each."""

    def keep(part: Encoder) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = dict(zip(part.read, args)) | kwargs
            outputs = (
                *(kwargs[name].float() for name in part.passed_inputs),
                *part.outputs_of(module, output),
            )
            taken = {str(i): array(tensor) for i, tensor in enumerate(outputs)}
            inputs = {name: given[name].long().numpy() for name in part.read}
            result.components[part.name] = (inputs, taken)

        return hook

    encoders = [part for part in row.components if part and part.name.startswith("text_encoder")]
    handles = [
        getattr(pipe, part.folder).register_forward_hook(keep(part), with_kwargs=True)
        for part in encoders
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_transformer(
    model: Any, row: Family, result: Recording, recorded: Sequence[int]
) -> Iterator[None]:
    """Keep every block's inputs and outputs, and the routers' logits, at the recorded steps."""
    from d2m.families import family_of_model
    from d2m.model.block_group import TEXT_MASK, BlockGroup, SkippedBlock, named_inputs
    from d2m.model.surgery import sparse_ffns
    from export.graph.routers import LOGITS

    family = family_of_model(model)
    names = {
        block: f"{name}.{index}."
        for _, name in family.blocks.kinds
        for index, block in enumerate(getattr(model, name))
        if not isinstance(block, SkippedBlock)
    }
    sites = sparse_ffns(model)
    shared = getattr(model, MODULATION, None)
    step, text_tokens = -1, 0
    told: Arrays = {}
    passed: list[tuple[Arrays, Arrays]] = []  # what every block or group of the step has passed on
    handles = []

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal step, text_tokens, told
        step += 1
        given = named_inputs(module, args, kwargs)
        text_tokens = row.text_tokens_of(given)
        if step in recorded:
            told = {name: array(tensor) for name, tensor in row.told(model, given).items()}
        passed.clear()
        for site in sites.values():
            site.record = step in recorded
        if step in recorded:
            result.blocks[step] = {}

    def pair(kwargs: Any, output: Any) -> tuple[Arrays, Arrays]:
        inputs = {name: array(tensor) for name, tensor in row.block_inputs(kwargs).items()} | told
        if shared is not None:
            inputs[MODULATION] = array(shared(kwargs["temb"]))
        if isinstance(output, dict):  # taken apart
            return inputs, {name: array(tensor) for name, tensor in output.items()}
        # A block that writes one stream returns the tensor itself.
        streams = zip(family.blocks.streams, output if isinstance(output, tuple) else (output,))
        return inputs, {
            STREAMS[stream]: array(tensor) for stream, tensor in streams if tensor is not None
        }

    def block(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if step not in recorded:
            return
        given = named_inputs(module, args, kwargs)
        passed.append(pair(*row.apart(given, output, text_tokens)))
        blocks, prefix = result.blocks[step], names[module]
        if not isinstance(module, BlockGroup):
            blocks[prefix] = passed[-1]
            return
        # Each block of a group, on what entered the group: skipped ones are compared too.
        for offset, (index, member) in enumerate(module.blocks.items()):
            own = module.of_block(offset, given)
            blocks[f"{prefix}blocks.{index}."] = pair(*row.apart(own, member(**own), text_tokens))
        read = zip(
            ("hidden_states", "encoder_hidden_states", "temb", TEXT_MASK), module.read(given)
        )
        inputs = {name: tensor for name, tensor in read if tensor is not None}
        logits = module.router(*inputs.values())
        blocks[prefix] = (
            {name: array(tensor) for name, tensor in inputs.items()} | passed[-1][0],
            {LOGITS: array(logits)},
        )

    def end(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if step not in recorded:
            return
        kwargs = named_inputs(module, args, kwargs)
        first, last = passed[0][0], passed[-1]
        found = row.model_inputs(model, kwargs, first)
        inputs = {
            n: each if isinstance(each, np.ndarray) else array(each) for n, each in found.items()
        }
        sample = {"sample": array(row.sample(model, output[0]))}
        if "transformer" not in result.components:
            result.components["transformer"] = (inputs, sample)
        # What is before the first block is known by what that block read, what is after the last by
        # what it wrote; a family adds what no block reads.
        unread = {name: array(each) for name, each in row.unread(model, kwargs).items()}
        own = {*STREAMS.values(), *row.through}  # written anew under the inputs' names
        embedded = {n: each for n, each in (first | unread).items() if n in own or n not in inputs}
        result.blocks[step]["embed"] = (inputs, embedded)
        ends = last[0] | last[1] | unread
        final = {name: ends[name] for name in row.tracing.final_inputs}
        result.blocks[step]["final"] = (final, sample)
        chosen = {name: site.last_logits for name, site in sites.items() if site.top_k}
        result.logits[step] = {
            name: array(logits).reshape(-1, logits.shape[-1])
            for name, logits in chosen.items()
            if logits is not None
        }

    handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    handles += [module.register_forward_hook(block, with_kwargs=True) for module in names]
    handles.append(model.register_forward_hook(end, with_kwargs=True))
    before = {name: site.record for name, site in sites.items()}
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, site in sites.items():
            site.record = before[name]


def to_unit(image: np.ndarray) -> np.ndarray:
    """-1..1 to 0..1, clipped, as images are saved."""
    return np.clip(image / 2 + 0.5, 0, 1)


def array(tensor: Any) -> np.ndarray:
    """A copy of a torch tensor as numpy, floats as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy().copy()
