"""The pipeline directory that is exported: its models, and the manifest's entries about it.

Reads a diffusers pipeline of a known family, dense or sparse. The transformer and T5 are built
without memory (their weights stay in the checkpoint until they are written), the smaller components
are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m.families import Family, family_of
from d2m.families.generation_defaults import generation_defaults
from d2m.model.components import check_components, empty_model, model_classes
from export.checkpoint.weights import Checkpoint, parameter_getter
from export.families import FAMILIES
from export.families.configs import config
from runtime.files.checked_json import read_json
from runtime.files.parameters import count

if TYPE_CHECKING:
    import torch

    from export.graph.program import Program

    Progress = Callable[[str, int, int], None]


@dataclass
class Component:
    """One component of a bundle before it is traced.

    `trace(dtype)` makes its program; `get` reads a checkpoint tensor, `own` tells its dtype;
    `storage` is the dtype to store in (None: each tensor's own).
    """

    name: str
    model: Any
    trace: Callable[[torch.dtype], Program]
    get: Callable[[str], torch.Tensor]
    own: Callable[[str], torch.dtype]
    storage: torch.dtype | None
    checkpoint: Checkpoint

    def stored_dtype(self, name: str, storage: torch.dtype | None) -> torch.dtype:
        """What a tensor is stored in where `storage` is asked for (None: nothing is).

        What the class keeps in float32 is not rounded to a half type: it is stored as it is.
        """
        from export.graph.trace import float32_for

        wanted = storage or self.storage
        if wanted is None or wanted in float32_for(self.model, name):
            return self.own(name)
        return wanted


def open_pipeline(directory: Path) -> tuple[Family, dict[str, Any], bool]:
    """The family, model_index.json, and whether the pipeline is sparse.

    FileNotFoundError or ValueError, one sentence, where it is no pipeline that export knows.
    """
    family = family_of(directory)
    index = read_json(directory / "model_index.json")
    row = FAMILIES[family.names.name]
    classes_of = (family.names.dense_class, family.names.sparse_class, *family.names.aliases)
    known: dict[str, tuple[str, ...]] = {"transformer": classes_of}
    known |= {
        model.folder: (model.cls, *model.others) for model in row.components if model is not None
    }
    known["scheduler"] = (row.scheduler,)
    for name, classes in known.items():
        found = (index.get(name) or [None, None])[1]
        if found not in classes:
            raise ValueError(
                f"{directory} has a {name} of class {found}, expected {' or '.join(classes)};"
                f" give a complete {family.names.title} pipeline, as save_pretrained or d2m"
                " convert writes it."
            )
        if not (directory / name).is_dir():
            raise FileNotFoundError(
                f"{directory} lacks the directory {name} that its model_index.json names; save the"
                " pipeline again."
            )
    sparse = index["transformer"][1] == family.names.sparse_class
    if sparse:
        check_exportable(directory)
    return family, index, sparse


def check_exportable(directory: Path) -> None:
    """ValueError for a sparse transformer that export cannot compile yet."""
    values = config(directory, "transformer")
    supported = {"renormalise": False}
    for name, plain in supported.items():
        if values.get(name, plain) not in (plain, {}):
            raise ValueError(
                f"{directory} has a transformer with {name} {values[name]!r}, expected {plain!r}:"
                " export does not compile it yet; generate from the directory with torch, or"
                f" convert without {name}."
            )


def open_components(
    directory: Path, sparse: bool, top_k: Sequence[int], progress: Progress | None = None
) -> list[Component]:
    """The components in the order in which an image needs them."""
    from transformers.utils import logging

    from export.graph.blocks import transformer_program
    from export.graph.trace import keep_float32

    logging.disable_progress_bar()
    check_components(directory)
    classes = dict(model_classes(directory))
    opened: dict[str, tuple[Any, Checkpoint, Any]] = {}  # the VAE is two components

    def loaded(name: str, folder: str, cls: Any, keyword: str, trace: Any) -> Component:
        if folder not in opened:
            checkpoint = Checkpoint(directory / folder)
            kind = {keyword: checkpoint.main_dtype()}
            model = cls.from_pretrained(directory / folder, local_files_only=True, **kind)
            keep_float32(model)
            opened[folder] = model, checkpoint, parameter_getter(model)
        model, checkpoint, get = opened[folder]
        stored = checkpoint.main_dtype()

        def own(key: str) -> torch.dtype:
            found: torch.dtype = get(key).dtype
            return found

        return Component(name, model, lambda d: trace(model, d), get, own, stored, checkpoint)

    def empty(
        name: str, folder: str, cls: Any, trace: Any, stored_name: Callable[[str], str]
    ) -> Component:
        from accelerate import init_empty_weights

        checkpoint = Checkpoint(directory / folder)
        with init_empty_weights(include_buffers=False):
            model = cls(cls.config_class.from_pretrained(directory / folder))
        model.tie_weights()
        names = set(checkpoint.names())

        # read: transformers gives a model without head the weights of one with it, which have this
        # before their names.
        headed = f"{getattr(model, 'base_model_prefix', '')}."

        def stored(key: str) -> str:
            found = (each for each in (key, headed + key) if each in names)
            return next(found, stored_name(key))

        if {stored(key) for key, _ in model.named_parameters()} - names:
            return loaded(name, folder, cls, "dtype", trace)  # named as an older release did
        keep_float32(model)
        kind = checkpoint.main_dtype()

        def get(key: str) -> torch.Tensor:
            return checkpoint.get(stored(key))

        def own(key: str) -> torch.dtype:
            return checkpoint.dtype(stored(key))

        model = model.eval()
        return Component(name, model, lambda d: trace(model, d), get, own, kind, checkpoint)

    row = FAMILIES[family_of(directory).names.name]
    skeleton = empty_transformer(directory)
    checkpoint = Checkpoint(directory / "transformer")

    # What a family's `prepare` adds to blocks lies in memory; all else is in the checkpoint.
    made = {name: own for name, own in skeleton.named_parameters() if not own.is_meta}

    def trace(dtype: torch.dtype) -> Program:
        return transformer_program(skeleton, row.tracing, dtype, top_k, progress)

    def transformer_tensor(name: str) -> torch.Tensor:
        return made[name] if name in made else checkpoint.get(name)

    found = []
    for encoder in row.components:
        if encoder is None:
            rest = transformer_tensor, checkpoint.dtype, None, checkpoint
            found.append(Component("transformer", skeleton, trace, *rest))
            continue
        cls = classes[encoder.folder]
        keyword = "dtype" if encoder.library == "transformers" else "torch_dtype"
        if encoder.whole:
            found.append(loaded(encoder.name, encoder.folder, cls, keyword, encoder.program))
        else:
            found.append(
                empty(encoder.name, encoder.folder, cls, encoder.program, encoder.stored_name)
            )
    return found


def empty_transformer(directory: Path) -> Any:
    """The transformer's structure without weights, prepared for tracing."""
    from export.graph.prepare import prepare
    from export.graph.trace import keep_float32

    model = empty_model(directory / "transformer", dict(model_classes(directory))["transformer"])
    model.pipeline = read_json(directory / "model_index.json")["_class_name"]
    keep_float32(model)
    return prepare(model, FAMILIES[family_of(directory).names.name].tracing)


def tokenizers(directory: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """name -> (the manifest's record, tokenizer.json's text); the file goes to record["file"]."""
    from transformers import AutoTokenizer

    row = FAMILIES[family_of(directory).names.name]
    lengths, index = row.lengths(directory), read_json(directory / "model_index.json")
    result = {}
    for name, length in lengths.items():
        tokenizer = AutoTokenizer.from_pretrained(directory / name, local_files_only=True)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or tokenizer.pad_token_id is None:
            raise ValueError(
                f"{directory / name} is a {type(tokenizer).__name__} without a tokenizer.json or a"
                " pad token, expected a fast tokenizer; save it again with transformers 4.56 or"
                " later."
            )
        record = {
            "file": f"{name}/tokenizer.json",
            "max_length": min(length, tokenizer.model_max_length),
            "pad_id": tokenizer.pad_token_id,
            "pad_token": tokenizer.pad_token,
            "eos_id": tokenizer.eos_token_id,
        }
        record |= row.tokens_record(tokenizer, record["max_length"], index)
        result[name] = (record, backend.to_str(pretty=False))
    return result


def manifest_entries(directory: Path, checkpoint: Checkpoint, sparse: bool) -> dict[str, Any]:
    """The manifest's entries that follow from configs: defaults, latents, scheduler, parameters."""
    from runtime.families import FAMILIES as RUNTIME_FAMILIES

    transformer, vae = config(directory, "transformer"), config(directory, "vae")
    scheduler = config(directory, "scheduler")
    RUNTIME_FAMILIES[family_of(directory).names.name].check_scheduler(scheduler)
    # JSON has no infinity, which diffusers writes for "no limit", a default.
    finite = {key: each for key, each in scheduler.items() if not _endless(each)}
    defaults = generation_defaults(directory)
    latents = FAMILIES[family_of(directory).names.name].latents(transformer, vae, directory)
    top_k = transformer.get("top_k") if sparse else None
    guided = FAMILIES[family_of(directory).names.name].guided
    grouped = any((transformer.get("groups") or {}).values())
    kappa = transformer.get("kappa", 1) if grouped else None
    parameters = count(checkpoint.shapes(), top_k, kappa)
    return {
        "defaults": {
            "steps": defaults["num_inference_steps"],
            "guidance": defaults["guidance_scale"],
            "height": defaults["height"],
            "width": defaults["width"],
        },
        "latents": latents,
        "model": family_of(directory).names.title_of(transformer),
        "scheduler": finite,
        "parameters": {key: parameters[key] for key in ("total", "activated")},
        "num_experts": transformer.get("num_experts") if sparse else None,
        "top_k": top_k,
        **({"kappa": kappa} if grouped else {}),
        **({"guided": guided(read_json(directory / "model_index.json"))} if guided else {}),
    }


def _endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
