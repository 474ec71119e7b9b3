"""The model card and the report of a pipeline with a LoRA in it.

Those of the pipeline before do not hold any more: their scores, images and figures are of a model
without the LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2m.report.page import page
from d2m.units import percent
from runtime.files.atomic import write_json, write_text
from runtime.files.checked_json import read_json

HERE = Path(__file__).parent
WHAT = {
    "attention": "attention",
    "modulation": "modulation",
    "shared": "shared experts",
    "routed": "routed experts",
    "dense": "dense FFNs",
    "other": "embeddings and the last layer",
    "nowhere": "left out, the model has no layer for it",
}


def write_card_and_report(
    made: Path, before: Path, onto: str, facts: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """README.md, report.json and report.html of the pipeline `made`.

    before: the directory that it was made from, called `onto`; facts: name (of the result), d2m and
    lora {file, sha256, scale, layers, rank, shares}; defaults: keywords of a pipeline's call.
    """
    from huggingface_hub import ModelCard, ModelCardData

    old = before / "README.md"
    text = old.read_text("utf-8", errors="replace") if old.is_file() else ""
    # Without front matter the library would warn of its absence.
    told = (
        ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text[:4] == "---\n" else {}
    )
    data = ModelCardData(
        base_model=onto,
        base_model_relation="merge",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=told.get("license"),
        license_name=told.get("license_name"),
        license_link=told.get("license_link"),
        tags=[*dict.fromkeys([*(told.get("tags") or ()), "lora"])],
    )
    lora = facts["lora"]
    rows = [(WHAT[kind], percent(share, 1)) for kind, share in lora["shares"].items()]
    shown: dict[str, Any] = {"name": facts["name"], "onto": onto, "lora": lora, "rows": rows}
    card = ModelCard.from_template(
        data,
        template_path=str(HERE / "card.md.j2"),
        **shown,
        sparse=read_json(made / "model_index.json")["transformer"][0] == "d2m",
        defaults=defaults,
        plain=lambda text: " ".join(text.split()).replace("`", "'").replace("|", "/"),
        repr=repr,
    )
    write_text(made / "README.md", f"{card}\n")
    write_json(made / "report.json", {"format": 1, "base_model": onto, **facts})
    write_text(made / "report.html", page("report.html.j2", HERE, **shown))
