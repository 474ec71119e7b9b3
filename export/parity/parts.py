"""The parts of a parity run: components, blocks, chosen experts, trajectory.

Each takes what torch recorded (export/parity/torch_recording.py) and runs the backend on the same
inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.parity.compare import Row, compare, measure, psnr
from export.parity.expert_agreement import agreement
from export.parity.tapped_bundle import tapped_bundle, tapped_plans
from export.parity.torch_recording import Recording, to_unit
from runtime.bundle.block_groups import choosing_groups, groups_of, windows
from runtime.bundle.directory import Bundle
from runtime.bundle.manifest import OPTIONAL
from runtime.families.flux import REFERENCE
from runtime.families.latents import reference_positions
from runtime.files.tensors import to_float32
from runtime.images.latents import NO_IMAGES, ImageLatents
from runtime.images.references import ReferenceTokens
from runtime.pipeline import Pipeline
from runtime.program.backends import PLAN_BACKENDS
from runtime.program.executor import open_component
from runtime.sampling import decode, denoise
from runtime.tokenizer import TextTokenizer

Progress = Callable[[str, int, int], None]


def plans_in_use(pipeline: Pipeline) -> str | None:
    """The target whose plans the pipeline runs; None with ONNX Runtime."""
    if pipeline.backend not in PLAN_BACKENDS:
        return None
    return str(pipeline.executor("transformer").target)  # type: ignore[attr-defined]


def open_blocks(bundle: Bundle, backend: str) -> Any:
    """The transformer's executor that can run one block alone: `executor.block(...)`."""
    options: dict[str, Any] = {} if backend in PLAN_BACKENDS else {"mode": "blocks"}
    return open_component(bundle, "transformer", backend, **options)


def compare_components(
    pipeline: Pipeline,
    reference: Recording,
    top_k: int | None,
    limit: float,
    kappa: int | None = None,
) -> list[Row]:
    """Every component on the inputs it has in torch."""
    rows = []
    for component, (inputs, outputs) in sorted(reference.components.items()):
        if component in OPTIONAL and component not in pipeline.manifest["components"]:
            continue
        row = pipeline.bundle.component(component)
        if len(inputs) == 1:  # named as the bundle names them
            inputs = dict(zip(row["inputs"], inputs.values()))
        outputs = dict(zip(row["outputs"], outputs.values()))
        missing = sorted(set(row["inputs"]) ^ set(inputs))
        if missing:
            raise ValueError(
                f"{component} of the bundle and of the pipeline differ in the inputs"
                f" {', '.join(missing)}, expected the same; export the bundle from this pipeline."
            )

        def run(feed: Mapping[str, np.ndarray], name: str = component) -> dict[str, np.ndarray]:
            return pipeline.execute(name, dict(feed), top_k, kappa)

        rows += compare(component, inputs, outputs, run, name=pipeline.backend, limit=limit)
    return rows


def compare_ids(pipeline: Pipeline, reference: Recording, prompts: Sequence[str]) -> list[Row]:
    """Token ids, which must be equal.

    A pipeline that encodes a prompt at a time, without padding, has recorded the last one's.
    """
    texts = [pipeline.family.with_template(prompt) for prompt in prompts]
    rows = []
    encoders = [name for name in pipeline.family.components if name.startswith("text_encoder")]
    for name, tokenizer in zip(encoders, pipeline.family.tokenizers, strict=True):
        expected = reference.components[name][0]["input_ids"]
        spec = pipeline.manifest["tokenizers"][tokenizer]
        found = TextTokenizer(tokenizer, pipeline.bundle.file(spec["file"]), spec)(texts)
        if len(expected) < len(found):
            found = found[-len(expected) :, : expected.shape[1]]
        rows.append(measure(name, "token ids", expected, found, limit=0.0))
    return rows


def compare_blocks(
    bundle: Bundle,
    backend: str,
    reference: Recording,
    top_k: int | None,
    limit: float,
    report: Progress,
) -> list[Row]:
    """Every block and router of the program alone, on torch's inputs, at the recorded steps."""
    component = bundle.component("transformer")
    executor = open_blocks(bundle, backend)
    program = [*component["program"], *(group for _, group in groups_of(component))]
    rows: list[Row] = []
    for number, (step, recorded) in enumerate(reference.blocks.items()):
        for index, call in enumerate(program):
            report("blocks", number * len(program) + index, len(reference.blocks) * len(program))
            kind, prefix = call["type"], call["prefix"]
            if (prefix or kind) not in recorded:
                raise ValueError(
                    f"the bundle has a block {prefix or kind!r} that the pipeline does not have,"
                    f" expected the same blocks; export the bundle from this pipeline."
                )
            inputs, outputs = recorded[prefix or kind]
            feed = {name: inputs[name] for name in component["types"][kind]["inputs"]}

            def run(
                feed: Mapping[str, np.ndarray], kind: str = kind, prefix: str = prefix
            ) -> dict[str, np.ndarray]:
                found = executor.block(kind, prefix, feed, top_k)
                return {name: to_float32(tensor) for name, tensor in found.items()}

            place = f"{prefix.rstrip('.') or kind} (step {step})"
            rows += compare(place, feed, outputs, run, name=backend, limit=limit)
    report("blocks", 1, 1)
    return rows


def compare_experts(
    bundle: Bundle,
    backend: str,
    target: str | None,
    sparse_dir: str | Path,
    reference: Recording,
    top_k: int,
    margin: float,
) -> dict[str, Any]:
    """The experts chosen by every router on torch's inputs of its block."""
    component = bundle.component("transformer")
    sites = []
    with tempfile.TemporaryDirectory(prefix="d2m-parity-") as folder:
        if target is None:
            tapped = tapped_bundle(bundle, Path(folder), top_k)
        else:
            tapped = tapped_plans(bundle, Path(folder), top_k, sparse_dir, target)
        executor = open_blocks(tapped, backend)
        for step, logits in reference.logits.items():
            for call in component["program"]:
                kind, prefix = call["type"], call["prefix"]
                inputs, _ = reference.blocks[step][prefix or kind]
                feed = {name: inputs[name] for name in component["types"][kind]["inputs"]}
                own = {n: v for n, v in logits.items() if prefix and n.startswith(prefix)}
                found = executor.block(kind, prefix, feed, top_k) if own else {}
                for name, expected in own.items():
                    tensor = found[f"{name.removeprefix(prefix)}.logits"]
                    sites.append((f"{name} (step {step})", expected, tensor))
    return agreement(sites, top_k, margin)


def compare_choices(
    bundle: Bundle, backend: str, reference: Recording, kappa: int, margin: float
) -> dict[str, Any] | None:
    """The blocks that every group's router chooses on torch's inputs; None if none chooses.

    As compare_experts, a group being a site and a sample what is a token there: the windows of
    kappa blocks are compared, the margin is between the two best windows' shares.
    """
    component = bundle.component("transformer")
    executor = open_blocks(bundle, backend)
    sites = []
    for step, blocks in reference.blocks.items():
        for name, group in choosing_groups(component, kappa):
            inputs, outputs = blocks[group["prefix"]]
            feed = {
                tensor: inputs[tensor] for tensor in component["types"][group["type"]]["inputs"]
            }
            found = executor.block(group["type"], group["prefix"], feed)
            pair = (next(iter(each.values())) for each in (outputs, found))
            sites.append((f"{name} (step {step})", *(windows(logits, kappa) for logits in pair)))
    return agreement(sites, 1, margin) | {"kappa": kappa} if sites else None  # type: ignore[arg-type]


def compare_trajectory(
    pipeline: Pipeline,
    reference: Recording,
    noise: np.ndarray,
    latent: tuple[int, ...],
    top_k: int | None,
    steps: int,
    report: Progress,
    kappa: int | None = None,
) -> dict[str, Any]:
    """Both generate from the same noise and torch's embeddings; the latents after each step.

    Of a model that reads an image beside its latents, with torch's channels or tokens of it.
    """
    found: list[np.ndarray] = []
    read = reference.components["transformer"][0]["hidden_states"]
    images = NO_IMAGES
    condition = pipeline.manifest["latents"].get("condition")
    if condition == REFERENCE:  # of the image's own size, as export.families.flux gives it
        family, axes = pipeline.family, len(pipeline.manifest["latents"]["rope_axes"])
        rows_and_columns = [(latent[0] // 2, latent[1] // 2)]
        positions = reference_positions(rows_and_columns, family.reference_place, axes)
        images = ImageLatents(references=ReferenceTokens(read[:1, noise.shape[1] :], positions))
    elif condition:
        images = ImageLatents(channels=read[: len(noise), :, noise.shape[-1] :])
    final = denoise(
        pipeline,
        noise,
        reference.conditions,
        latent_size=(latent[0], latent[1]),
        top_k=[top_k] * steps,
        kappa=[kappa] * steps,
        guidance=pipeline.manifest["defaults"]["guidance"],
        negative=reference.negative,
        images=images,
        step=lambda done, total: report("trajectory", done, total),
        after=lambda done, total, latents: found.append(latents.copy()),
    )
    rows = [
        measure("latents", f"step {step}", expected, latents, limit=float("inf"))
        for step, (expected, latents) in enumerate(zip(reference.latents[1:], found, strict=True))
    ]
    generated = to_unit(decode(pipeline, final, (latent[0], latent[1])))
    return {
        "steps": [
            {"step": i, "relative_error": row.relative_error, "cosine": row.cosine}
            for i, row in enumerate(rows)
        ],
        "image_psnr": [psnr(a, b) for a, b in zip(reference.image, generated, strict=True)],
    }
