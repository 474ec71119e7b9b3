"""What convert, export and run will need, before they start: memory, disk and time, by formula.

Torch-free, from configs and sizes of files. Memory and disk are counted (block by block, tensor by
tensor) on top of what the libraries take, which was measured; every need carries its formula.
Time is counted in work (bytes, FLOPs) at this machine's measured speed, and is what it is on a
machine that other programs use: right within a factor of two.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2m.families.weights import Stack, Structure, dim_of
from d2m.plan.count import plan
from d2m.plan.model_config import Subject, subject_of
from d2m.units import GB
from runtime.files.checked_json import read_json

# Resident bytes of a process that has done nothing yet but import (measured, CPU build of torch).
CONVERTING = 0.72 * GB
EXPORTING = 0.71 * GB
RUNNING = 0.15 * GB
PLAN = 3.2e6  # bytes of a plan of one block type and number of experts, as measured
GRAPH = 0.05e6  # bytes of its ONNX graph
# Tensors as large as decoding's widest that are held at once: what is alive, as counted on the
# real classes (tests/d2m/families/test_encoders.py), and ONNX Runtime on a CPU
# (scripts/bench/decoder.py).
ALIVE = 3.0
ORT = 5.3
# Seconds of one core (measured on an AMD EPYC without AVX512), by byte of what is read.
STREAM = 5.4e-9  # a streamed conversion
WRITE = 3.2e-9  # what an export writes
START = 9.0  # imports
FITTED = 9.5  # shared modulation, blocks read back and checked
TRACE = 3.5  # a graph, in float32 and again in bfloat16
COMPILE = 2.0  # a plan


@dataclass(frozen=True)
class Needs:
    """What a stage needs: resident bytes of its largest process, of the GPU, bytes it leaves.

    cpu: seconds of one core; flops: work that scales with the machine's arithmetic instead.
    formula: how `ram` came about.
    """

    stage: str
    ram: int
    disk: int
    cpu: float
    formula: str
    vram: int | None = None
    flops: float = 0.0

    def seconds(self, machine: Mapping[str, Any]) -> float:
        """On a machine as `d2m.plan.machine.machine` describes it."""
        share = max(0.02, machine["share"])
        disk = self.disk / machine["disk_speed"] if machine["disk_speed"] else 0.0
        return self.cpu / share + self.flops / machine["flops"] + disk


def folder_bytes(folder: Path, *, without: str = "") -> int:
    """Bytes of the files in a directory, its child `without` left out."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] != without
    )


def component_bytes(
    model: str | os.PathLike[str], *, bundled: bool = False, held: bool = False
) -> int:
    """Bytes of a pipeline's components but its transformer: all, or what a bundle gets of it
    (`bundled`), or what export holds in memory (`held`).

    A shipped config has no files: the family's published components count, in 16 bits.
    """
    root, encoders = Path(model), subject_of(model).encoders
    if not root.is_dir():
        rows = [each for each in encoders.values() if each.whole or not held]
        return sum(2 * (each.bundled if bundled else each.params) for each in rows)
    if not (root / "model_index.json").is_file():
        return 0
    sizes = {name: folder_bytes(root / name) for name in encoders}
    if held:
        return sum(sizes[name] for name, each in encoders.items() if each.whole)
    if not bundled:
        return folder_bytes(root, without="transformer")
    left = (
        sizes[name] * (each.params - each.bundled) // each.params for name, each in encoders.items()
    )
    return folder_bytes(root, without="transformer") - sum(left)


def largest_component(model: str | os.PathLike[str]) -> int:
    """Bytes of the largest component beside the transformer that is in memory, in 16 bits.

    With streamed weights, which text encoders of many calls have too.
    """
    root, encoders = Path(model), subject_of(model).encoders
    found = []
    for name, each in encoders.items():
        size = folder_bytes(root / name) if root.is_dir() else 2 * each.bundled
        found.append(each.at_once(size))
    return max(found)


def largest_component_tensor(model: str | os.PathLike[str]) -> int:
    """Bytes of the largest tensor outside the transformer, with those that export reads one by one.

    Of a directory by its files, else the family's published components in 16 bits.
    """
    from runtime.files.tensors import read_header

    root, encoders = Path(model), subject_of(model).encoders
    if not root.is_dir():
        return max(2 * each.largest for each in encoders.values())
    found = [0]
    for name in encoders:
        for file in (root / name).glob("*.safetensors"):
            found += [tensor.end - tensor.start for tensor in read_header(file).values()]
    return max(found)


def element_bytes(folder: Path, params: int) -> int:
    """2 or 4: what most of a transformer's numbers are stored in, by the size of its files."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return 4 if params and size / params > 3 else 2


def convert_needs(
    model: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | None = None,
    *,
    preset: str | None = None,
    streamed: bool = True,
) -> Needs:
    """Of `d2m convert`: `streamed` is --init-only with importance that needs no run.

    Raises as `d2m.plan.count.plan`. A shipped config counts as stored in 16 bits.
    """
    subject = subject_of(model)
    answer = plan(model, preset=preset, recipe=recipe)
    params = answer["dense"]["params"]
    size = element_bytes(Path(model) / "transformer", params)
    dtype = {2: "bf16", 4: "fp32"}[size]
    around = component_bytes(model)
    disk = answer["memory"][dtype] + around
    if streamed:
        ram = CONVERTING + block_peak(subject, size)
        formula = (
            "libraries + the largest block, its FFNs read back, and one of them in float32 twice"
        )
        cpu = START + FITTED + STREAM * params * size
        return Needs("convert", int(ram), disk, cpu, formula)
    # In float32: both models, and for what learns a gradient and Adam's two moments.
    disk = answer["memory"]["fp32"] + around
    ram = CONVERTING + around + 4 * params + 4 * 4 * answer["total_params"]
    formula = "libraries + encoders + 4 B x dense + 16 B x sparse parameters, and activations"
    return Needs("convert", int(ram), disk, START, formula, vram=int(ram - CONVERTING))


def block_peak(subject: Subject, size: int) -> int:
    """Bytes that a streamed conversion holds at once: see d2m.convert.streamed.check_blocks.

    (FLUX.1: a double block has 36 D^2 weights, 12 of modulation, two FFNs of 8.)
    """
    dim = dim_of(subject.config)
    sizes = [
        [sum(w.size for w in stack.weights if w.part not in but) for but in ((), ("adaln",))]
        for stack in block_stacks(subject)
    ]
    block, plain = max(sizes)
    return size * (block + plain // 2 + 8 * dim * dim) + 4 * 16 * dim * dim


def block_stacks(subject: Subject) -> list[Stack]:
    """The dense model's kinds of blocks."""
    stacks = subject.family.plan.weights(subject.config, Structure(), 1, 1)
    return [stack for stack in stacks if stack.prefix and stack.count]


def export_needs(
    model: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    top_k: int = 4,
    plans: int = 0,
    link: bool = False,
    storage: int | None = None,
) -> Needs:
    """Of `d2m export`: `top_k` numbers of experts, `plans` sets of plans, `storage` bytes.

    With a recipe or preset, of what the dense `model` will be converted to.
    """
    answer = plan(model, recipe=recipe, preset=preset)
    root = Path(model)
    subject = subject_of(model)
    dense = subject.sparse is None
    own = element_bytes(
        root / "transformer", answer["dense"]["params"] if dense else answer["total_params"]
    )
    size = storage or own
    sparse = answer["num_experts"] is not None
    experts = expert_bytes(root) if link and sparse and size == own else 0
    weights = answer["memory"][{2: "bf16", 4: "fp32"}[size]] - neuron_bytes(subject, sparse)
    encoders, around = component_bytes(model, bundled=True), subject.encoders
    graphs = 2 + len(around) + len(block_stacks(subject)) * (top_k if sparse else 1)
    disk = weights + encoders - experts + int(graphs * (GRAPH + plans * PLAN))
    held = component_bytes(model, held=True)
    largest = max(dim_of(subject.config) ** 2 * 6 * max(size, own), largest_component_tensor(model))
    ram = EXPORTING + held + 2 * largest
    cpu = START + TRACE * graphs + WRITE * (weights - experts) + COMPILE * graphs * plans
    formula = "libraries + VAE and CLIP + the largest tensor and its copy"
    return Needs("export", int(ram), disk, cpu, formula)


def expert_bytes(root: Path) -> int:
    """Bytes of shards that hold experts alone, by the checkpoint's index (0 without one)."""
    from runtime.files.tensors import read_index

    folder = root / "transformer"
    found = next(iter(sorted(folder.glob("*.index.json"))), None)
    if found is None:
        return 0
    where: dict[str, list[str]] = {}
    for name, file in read_index(found).items():
        where.setdefault(file, []).append(name)
    only = [file for file, names in where.items() if all(".experts." in name for name in names)]
    return sum((folder / file).stat().st_size for file in only if (folder / file).is_file())


def neuron_bytes(subject: Subject, sparse: bool) -> int:
    """Bytes of the permutations of neurons, which a bundle leaves out: 4 D numbers an FFN."""
    lists = {blocks: kind for kind, blocks in subject.family.blocks.kinds}
    sites = sum(subject.depth[lists[site.blocks]] for site in subject.family.blocks.sites)
    return 8 * 4 * dim_of(subject.config) * sites if sparse else 0


def decoding(model: str | os.PathLike[str], height: int, width: int, tensors: float) -> int:
    """Numbers that decoding an image of height x width holds at once.

    The most of `tensors` of its widest tensors, and the scores and weights of its attention, of a
    head too large to be fused, between all latents. A shipped config counts as published.
    """
    subject, file = subject_of(model), Path(model) / "vae" / "config.json"
    raw = read_json(file) if file.is_file() else {}
    levels = raw.get("block_out_channels")
    if "base_dim" in raw:  # Qwen-Image's
        levels = [raw["base_dim"] * times for times in raw["dim_mult"]]
    widest = levels[:2][-1] if levels else subject.encoders["vae"].widest
    latents = height * width // 4 ** subject.family.plan.halvings(raw)
    attention = 2 * latents**2 if raw.get("mid_block_add_attention", True) else 0
    return max(int(tensors * widest * height * width), attention)


def run_needs(
    model: str | os.PathLike[str], *, steps: int = 28, offload: bool = False, **size: Any
) -> Needs:
    """Of generating one image from the bundle: on a GPU in 16 bits, on a CPU in float32.

    offload: `--offload block` on a CPU, two blocks of weights in memory and one component at a time
    (results/big/offload.json was measured so). size: height, width, text_tokens, top_k, preset,
    recipe of `d2m.plan.count.plan`.
    """
    answer = plan(model, **size)
    encoders = component_bytes(model, bundled=True)
    tokens = answer["image_tokens"] + answer["text_tokens"]
    dim = dim_of(subject_of(model).config)
    # Streams, QKV, hidden of the widest matmul and its neighbours: about 20 D numbers a token.
    activations = 20 * tokens * dim
    alive, held = (
        max(activations, decoding(model, answer["height"], answer["width"], tensors))
        for tensors in (ALIVE, ORT)
    )
    vram = answer["memory"]["bf16"] + encoders + 2 * alive + int(0.5 * GB)
    ram = RUNNING + answer["memory"]["fp32"] + 2 * encoders + 4 * held
    formula = (
        "libraries + weights and encoders in float32 + the larger of 20 D numbers a token and the "
        "decoder's widest tensors"
    )
    if offload:
        subject = subject_of(model)
        blocks = max(sum(w.size for w in stack.weights) for stack in block_stacks(subject))
        outside = sum(
            stack.count * sum(w.size for w in stack.weights)
            for stack in subject.family.plan.weights(subject.config, Structure(), 1, 1)
            if not stack.prefix
        )
        ram = RUNNING + max(4 * (2 * blocks + outside + held), 2 * largest_component(model))
        vram = 0
        formula = (
            "libraries + the larger of the largest component in float32, and two blocks and what "
            "lies outside blocks in float32 with the same numbers"
        )
    work = float(steps) * answer["flops"]
    disk = answer["memory"]["bf16"] + encoders
    return Needs("run", int(ram), disk, 2.0, formula, vram=vram or None, flops=work)
