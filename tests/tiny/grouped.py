"""A tiny sparse pipeline whose blocks sit in groups of three, and what its bundles are fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2m.recipe.structure import Blocks
from tests.tiny.pair import grouped_pair
from tests.tiny.pipeline import build_pipeline, randomize, tiny_inputs

KAPPAS = (1, 2, 3)
GROUPS = {
    "transformer_blocks.1": ("transformer_blocks", (1, 2, 3)),
    "single_transformer_blocks.0": ("single_transformer_blocks", (0, 1, 2)),
}


def blocks_of(alpha: float, grouped: bool = True) -> Blocks:
    """A group of each kind, the last single block left out; without groups the same blocks."""
    groups = {"double": ((1, 2, 3),), "single": ((0, 1, 2),)} if grouped else {}
    return Blocks(**groups, alpha=alpha, drop_single=(4,))


def grouped_pipeline(
    directory: Path, alpha: float, grouped: bool = True, adaln: str = "full"
) -> Path:
    """Save it: gates and routers that leave no doubt, the same values with and without groups."""
    import torch

    from d2m.model.block_group import block_groups
    from d2m.model.grouping import dense_name
    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel
    from d2m.model.surgery import sparse_ffns

    student, _ = grouped_pair(3, blocks_of(alpha))
    if adaln != "full":
        config = {k: v for k, v in student.config.items() if not k.startswith("_")}
        student = SparseFluxTransformer2DModel(**{**config, "adaln": adaln}).eval()
        randomize(student, 5)
    generator = torch.Generator().manual_seed(4)
    routers = [group.router for group in block_groups(student).values()]
    for module in (*(ffn.gate for ffn in sparse_ffns(student).values()), *routers):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    if not grouped:
        plain, _ = grouped_pair(3, blocks_of(alpha, False))
        state = {dense_name(n): t for n, t in student.state_dict().items() if ".router." not in n}
        plain.load_state_dict(state)
        student = plain
    pipe = build_pipeline()
    pipe.register_modules(transformer=student)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(directory)
    return directory


def load_transformer(directory: Path) -> Any:
    """The pipeline's transformer, as torch runs it."""
    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel

    return SparseFluxTransformer2DModel.from_pretrained(directory / "transformer").eval()


def feed_of(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A torch model's inputs as a bundle takes them: rotary tables in place of positions."""
    import torch

    cos, sin = model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if not name.endswith("_ids")}
    return {**feed, "rope_cos": cos.numpy(), "rope_sin": sin.numpy()}


def differing(model: Any, batch: int = 4) -> dict[str, Any]:
    """Inputs whose samples choose different blocks in every group, at kappa 1 and 2."""
    from d2m.model.block_group import set_kappa

    for seed in range(200):
        inputs = tiny_inputs(seed, batch=batch)
        if all(len(set(starts)) > 1 for k in (1, 2) for starts in chosen(model, inputs, k)):
            set_kappa(model, 1)
            return inputs
    raise AssertionError("no batch chooses differently")


def chosen(model: Any, inputs: dict[str, Any], kappa: int) -> list[list[int]]:
    """The first chosen block of every sample, for each group: offsets in the group."""
    import torch

    from d2m.model.block_group import block_groups, set_kappa

    set_kappa(model, kappa)
    groups = block_groups(model).values()
    for group in groups:
        group.record = True
    with torch.no_grad():
        model(**inputs)
    found = [group.last_logits.argmax(-1).tolist() for group in groups]
    for group in groups:
        group.record = False
    return found
