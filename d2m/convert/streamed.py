"""A conversion of a model larger than memory: block by block, file to file.

What `d2m.convert.in_memory` does with `init_only`, in memory for one block; with a recipe's `local`
each block's FFNs learn before it is written (d2m.convert.local). Every block is two shards of the
result, written at once, so a run that was killed goes on at the block it was killed in. Experts lie
in shards of their own: a bundle takes them as they are, and may share the files
(export/checkpoint/shared_shards.py).
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.convert.sparse_pipeline import parameters_of, publish, timed, write_around
from d2m.convert.workdir import RECORD, begin
from d2m.families import Family
from d2m.families.ffn_sites import sites_of, spec_at
from d2m.families.weights import dim_of
from d2m.plan.presets import recipe_named
from d2m.recipe import recipe as recipes
from d2m.recipe.recipe import Progress, Recipe, SparseSpec
from d2m.shards import Shards, open_shards, shard_name, write_index, write_shard
from runtime.files.atomic import write_json
from runtime.files.checked_json import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from d2m.convert.local import LocalDistillation
    from d2m.families.ffn_sites import DenseFFN

Scores = Callable[[str, "DenseFFN"], "Tensor"]
PHASE = "convert block by block"
EXPERTS = "experts"  # module of the matrices and biases of an FFN's experts
SCORES = "importance"  # in the work directory: a file for every block that is done


def convert_stream(
    dense_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    recipe: Recipe | str | Path,
    scores: Scores | None = None,
    importance: str = "activations",
    *,
    batches: Callable[[Any, int], Any] | None = None,
    data: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Convert the pipeline in `dense_dir` without loading it whole; write `out_dir`.

    Args:
        dense_dir: a diffusers pipeline directory of a known family, or a hub id.
        recipe: a Recipe, the name of a preset for such a model, or the path of a recipe file.
        scores: (site name, dense FFN) -> importance [N].
        importance: what `scores` are: a split that recipes know, such as magnitude, or any words;
            a resume must have the same.
        batches: (pipeline without transformer, seed) -> batches, needed where the recipe has
            `local`; then every FFN learns by itself (d2m.convert.local), by inputs of theirs and
            not by `scores`. data: a label that tells them from other data on a resume.

    Tensors keep the dtype they have. Shared modulation is fitted to embeddings of times and
    guidance as in training and of random pooled text, since no text encoder runs (the log says so).

    Returns out, base_model, recipe, importance, parameters, checked (block -> relative error of
    its FFNs' outputs, all experts on, from what lies on disk) and seconds (by phase).

    Raises as `d2m.convert.in_memory.convert`.
    """
    recipe = dataclasses.replace(recipe_named(recipe, dense_dir), stages=())
    if importance in recipes.SPLITS:
        recipe = dataclasses.replace(recipe, split=importance)
    if batches is None:  # no data is seen
        recipe = dataclasses.replace(recipe, experts="rank", router="random")
    assert (recipe.local is None) == (batches is None) and (scores is None) == (batches is not None)
    facts = {"importance": importance, "data": data}
    conversion = begin(dense_dir, out_dir, recipe, resume, log, **facts)
    if conversion is None:
        return {"out": str(Path(out_dir)), "already_converted": True}
    import torch

    from d2m.convert.local import LocalDistillation
    from d2m.convert.teacher_inputs import TeacherInputs, dense_skeleton, load_outside
    from d2m.model.components import check_components

    path, family, work = conversion.dense, conversion.family, conversion.work
    check_components(path)
    source = open_shards(path / "transformer")
    sparse = _structure(path / "transformer", recipe, family)
    write_json(work / RECORD, conversion.identity)

    seconds: dict[str, float] = {}
    result = conversion.result
    folder = result / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink()  # of a kill
    # Shard 1 is what belongs to no block; then two a block, so that a block is done when both of
    # its files are there, and a resume needs no record of its own.
    blocks = block_names(source, family)
    count = 2 * len(blocks) + 1
    files = [shard_name(i + 1, count) for i in range(count)]
    for stale in {path.name for path in folder.glob("*.safetensors")} - set(files):
        (folder / stale).unlink()  # of a version with other shards
    with timed(seconds, "modulation"):
        shared = _modulation(source, sparse, recipe, work, log)
    taught: LocalDistillation | None = None
    inputs: Iterator[tuple[str, dict[str, Tensor]]] = iter(())
    if batches is not None:
        taught = LocalDistillation(recipe, family, "cuda" if torch.cuda.is_available() else "cpu")
        with timed(seconds, "inputs"):
            model = dense_skeleton(path / "transformer", family)
            load_outside(model, source, blocks, torch.float32, taught.device)
            calls = teacher_calls(path, model, family, recipe, batches, taught.device)
        inputs = iter(
            TeacherInputs(
                model,
                source,
                family,
                blocks,
                calls,
                rows=taught.local.rows,
                seed=recipe.seed,
                device=taught.device,
            )
        )
        scores = taught.scores
    assert scores is not None
    with timed(seconds, "blocks"), closing_of(inputs):
        first = folder / files[0]
        if not first.is_file():
            write_shard(first, _convert_outside(source, blocks, recipe, family, shared))
        for done, (block, file, experts) in enumerate(zip(blocks, files[1::2], files[2::2])):
            if progress:
                progress(PHASE, done, len(blocks))
            if taught is not None:
                ran, taught.inputs = next(inputs)
                assert ran == block
            if not ((folder / file).is_file() and (folder / experts).is_file()):
                tensors, found = _convert_block(
                    source, block, recipe, family, scores, shared, taught
                )
                if taught is not None:
                    write_json(work / SCORES / f"{block}.json", taught.errors)
                    taught.errors = {}
                write_shard(work / SCORES / f"{block}.safetensors", found)
                apart = {key for key in tensors if key.split(".")[-2] == EXPERTS}
                write_shard(folder / experts, {key: tensors[key] for key in sorted(apart)})
                write_shard(folder / file, {k: v for k, v in tensors.items() if k not in apart})
        if progress:
            progress(PHASE, len(blocks), len(blocks))
    # From the files alone, not from memory: what a reader will find is what is checked.
    written = write_index(folder, files)
    _check_complete(written, sparse)
    sparse.save_config(folder)
    with timed(seconds, "check"):
        checked = check_blocks(source, written, sampled(blocks, recipe.seed), recipe, family)
    learnt = _load_errors(work / SCORES)
    if learnt:
        write_json(result / "local.json", learnt)
    neurons = _load_scores(work / SCORES)
    for name in ("model_index.json", "recipe.json"):  # half of a result, of a kill
        (result / name).unlink(missing_ok=True)
    for part in result.iterdir():
        if part.is_dir() and part != folder:
            shutil.rmtree(part)
    write_around(result, family.names.sparse_class, path, recipe, neurons)
    answer = publish(conversion, parameters_of(source.shapes, written.shapes, recipe), {}, None)
    answer |= {"importance": importance, "checked": checked, "seconds": seconds}
    return answer | ({"local": summary_of(learnt)} if learnt else {})


def block_names(source: Shards, family: Family) -> list[str]:
    """Names of all blocks, `transformer_blocks.0`, in the order they run."""
    found = []
    for _, name in family.blocks.kinds:
        inside = {key.split(".")[1] for key in source.where if key.startswith(f"{name}.")}
        found += [f"{name}.{index}" for index in sorted(map(int, inside))]
    return found


def sampled(blocks: list[str], seed: int) -> list[str]:
    """Blocks to check: the first and the last of each kind, and one more by seed."""
    import random

    kinds = dict.fromkeys(block.split(".")[0] for block in blocks)
    ends = [[b for b in blocks if b.startswith(kind + ".")] for kind in kinds]
    chosen = {each for of_kind in ends for each in (of_kind[0], of_kind[-1])}
    chosen.add(random.Random(seed).choice(blocks))
    return [block for block in blocks if block in chosen]


# ---------------------------------------------------------------- what is written


def _structure(folder: Path, recipe: Recipe, family: Family) -> Any:
    """The sparse model on the meta device: names, shapes and config of the result."""
    import diffusers
    import torch

    from d2m.model.components import read_config
    from d2m.model.modulation import norms, rank_of
    from d2m.model.sparse_transformer import sparse_class, structure

    config = read_config(folder, getattr(diffusers, family.names.dense_class))
    with torch.device("meta"):
        whole = sparse_class(family)(**config)
        rank = rank_of(recipe.adaln, dim_of(whole.config), sum(norms(whole).values()))
        mode: dict[str, Any] = {"adaln": recipe.adaln.mode, "adaln_rank": rank}
        return sparse_class(family)(**{**config, **structure(recipe), **mode})


def _convert_outside(
    source: Shards, blocks: list[str], recipe: Recipe, family: Family, shared: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What belongs to no block: embedders, output, routers of groups, shared modulation."""
    from d2m.model.grouping import group_router, routers_like

    inside = tuple(f"{block}." for block in blocks)
    tensors = source.read(key for key in source.where if not key.startswith(inside))
    tensors |= {key: value for key, value in shared.items() if key.startswith("modulation.")}
    for kind, name in family.blocks.kinds:
        for group in recipe.blocks.groups(kind):
            place = f"{name}.{group[0]}"
            key = routers_like(source.where, place)
            tensors |= group_router(place, len(group), source.read([key])[key], family, recipe.seed)
    return tensors


def _convert_block(
    source: Shards,
    block: str,
    recipe: Recipe,
    family: Family,
    scores: Scores,
    shared: Mapping[str, Tensor],
    taught: LocalDistillation | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A block's tensors in the sparse model, and the importance of its FFNs' neurons by site."""
    from d2m.families.ffn_sites import read_ffn
    from d2m.model.grouping import renamed
    from d2m.model.modulation import own_linear
    from d2m.model.surgery import convert_state_dict, split_neurons
    from d2m.recipe.recipe import hidden_sizes

    dense = source.read(key for key in source.where if key.startswith(f"{block}."))
    found, permutations = {}, {}
    for name, _, site in sites_of(dense, family):
        ffn = read_ffn(dense.__getitem__, block, site)
        found[name] = scores(name, ffn).float().cpu()
        if found[name].shape != (ffn.neurons,):
            raise ValueError(
                f"the importance of {name} has shape {list(found[name].shape)}; expected "
                f"[{ffn.neurons}], a number for every hidden neuron of this model."
            )
        width, _ = hidden_sizes(ffn.neurons, spec_at(recipe.spec, name, family))
        permutations[name] = split_neurons(found[name], width, recipe.num_experts)
    tensors = convert_state_dict(dense, permutations, recipe.spec, family, recipe.seed)
    if taught is not None:
        taught.learn(block, dense, tensors)
    shared_here = {key: value for key, value in shared.items() if key.startswith(f"{block}.")}
    norms = {key.rpartition(".")[0].removesuffix(".up") for key in shared_here}
    replaced = tuple(f"{own_linear(source.where, norm)}." for norm in norms)
    kept = {k: v for k, v in tensors.items() if not k.startswith(replaced)}
    return renamed(kept | shared_here, recipe.blocks, family), found


def _modulation(
    source: Shards, sparse: Any, recipe: Recipe, work: Path, log: Callable[[str], None]
) -> dict[str, Tensor]:
    """Tensors of shared modulation under their names in the dense block order; {} in mode full."""
    if recipe.adaln.mode == "full":
        return {}
    from d2m.convert.first_student import compute_once
    from d2m.convert.modulation_fit import fit_from_shards

    log(
        f"modulation {recipe.adaln.mode} is fitted to embeddings of random pooled text, since no "
        "text encoder runs; distillation or a calibrated conversion does better."
    )
    file = work / "modulation.safetensors"
    return compute_once(file, lambda: fit_from_shards(source, sparse, recipe))


def teacher_calls(
    path: Path,
    model: Any,
    family: Family,
    recipe: Recipe,
    batches: Callable[[Any, int], Any],
    device: str,
) -> list[dict[str, Any]]:
    """Keywords of the teacher's forward for the recipe's samples, float32, on the device.

    model: the teacher, of which nothing is needed but config and what lies outside its blocks.
    """
    import torch

    from d2m.families.flow import generator_at, training_point
    from d2m.generate import load_pipeline

    local = recipe.local
    assert local is not None
    pipe = load_pipeline(path, transformer=False, dtype="fp32", device=device)
    pipe.register_modules(transformer=model)
    batch_of = batches(pipe, recipe.seed)
    calls = []
    for step in range(math.ceil(local.samples / local.batch_size)):
        batch = batch_of(step, local.batch_size)
        at = generator_at(recipe.seed, "local inputs", step)
        point = batch, at, recipe.t_mean, recipe.t_std, family.data.noised
        with torch.no_grad():
            x, t = training_point(*point)
            given = family.data.inputs(model, batch, x.float(), t)
        calls.append(
            {
                name: each.to(device, torch.float32 if each.is_floating_point() else None)
                if isinstance(each, torch.Tensor)
                else each
                for name, each in given.items()
            }
        )
    return calls


@contextmanager
def closing_of(inputs: Iterator[Any]) -> Iterator[None]:
    """Within no gradients are kept but where an FFN learns; after it the teacher is stopped."""
    import torch

    try:
        with torch.no_grad():
            yield
    finally:
        if hasattr(inputs, "close"):
            inputs.close()


def _load_errors(folder: Path) -> dict[str, Any]:
    """What the FFNs learnt, by site name, in the order of blocks."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.json")):
        found |= read_json(file)
    return found


def summary_of(learnt: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean relative squared error of the FFNs before and after they learnt."""
    count = max(1, len(learnt))
    return {
        when: round(sum(row[when] for row in learnt.values()) / count, 6)
        for when in ("before", "after")
    }


def _load_scores(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


# ---------------------------------------------------------------- what is checked


def _check_complete(written: Shards, sparse: Any) -> None:
    """AssertionError unless names and shapes are those of the model that will read them."""
    expected = {name: tuple(tensor.shape) for name, tensor in sparse.state_dict().items()}
    differing = dict(expected.items() ^ written.shapes.items())
    assert not differing, sorted(differing)[:3]


def check_blocks(
    source: Shards, written: Shards, blocks: list[str], recipe: Recipe, family: Family
) -> dict[str, float]:
    """Blocks read back from disk against the dense ones: block -> relative error of its FFNs.

    The FFNs' outputs in float32 for random tokens, all experts on at unit gates. What is no FFN
    must be bit for bit the same. ValueError where the error is more than the stored dtype's
    rounding, or a tensor differs: the disk or the memory is not to be trusted.
    """
    import torch

    from d2m.model.grouping import renamed

    answer: dict[str, float] = {}
    for block in blocks:
        dense = source.read(key for key in source.where if key.startswith(f"{block}."))
        names = {key: next(iter(renamed({key: value}, recipe.blocks, family)), None)
                 for key, value in dense.items()}  # fmt: skip
        plain = [key for key, new in names.items() if new in written.where]
        if not any(names.values()):
            continue  # dropped for good
        same = written.read(str(names[key]) for key in plain)
        wrong = [key for key in plain if not torch.equal(same[str(names[key])], dense[key])]
        error = 0.0
        for name, _, site in sites_of(dense, family):
            if recipe.local is not None:
                continue  # they have learnt; local.json holds their errors
            place = next(iter(renamed({f"{name}.x": dense[plain[0]]}, recipe.blocks, family)))[:-2]
            own = spec_at(recipe.spec, name, family)
            error = max(error, _site_error(dense, written, block, place, site, own))
        if wrong or error > ROUNDING[dense[plain[0]].element_size()]:
            what = f"{wrong[0]} differs" if wrong else f"its FFNs differ by {error:.1g}"
            raise ValueError(
                f"{block} read back from {written.folder} is not the dense one: {what}; check the "
                "disk, remove the unfinished conversion and start again."
            )
        answer[block] = error
    return answer


# Relative error allowed, by bytes of an element: the experts' second matrix is stored times E, a
# rounding in bfloat16 (2^-9 each, 16 bits may also be float16).
ROUNDING = {8: 1e-12, 4: 1e-5, 2: 1e-2}


def _site_error(
    dense: Mapping[str, Tensor],
    written: Shards,
    block: str,
    place: str,
    site: Any,
    spec: SparseSpec,
) -> float:
    """Relative error of one FFN's output, dense tensors against written ones."""
    import torch

    from d2m.families.ffn_sites import read_ffn, read_rest
    from d2m.model.surgery import run_dense, stored_ffn

    wide = torch.float64 if next(iter(dense.values())).dtype == torch.float64 else torch.float32
    given = read_ffn(dense.__getitem__, block, site).to(wide)
    state = written.read(key for key in written.where if key.startswith(f"{place}."))
    whole = dataclasses.replace(spec, top_k=spec.num_experts, renormalise=False)
    ffn = stored_ffn(state, place, given, site, whole, wide)
    x = torch.randn(8, given.width, generator=torch.Generator().manual_seed(0)).to(wide)
    with torch.no_grad():
        ffn.gate.weight.zero_()  # unit gates
        expected = run_dense(given, x, site.activation)
        error = float((ffn(x) - expected).norm() / expected.norm())
        within = place.removesuffix(f".{site.module}")
        for local, rest in read_rest(dense.__getitem__, block, site).items():
            key = f"{within}.{local}"
            if not torch.equal(written.read([key])[key], rest):
                return float("inf")
    return error
