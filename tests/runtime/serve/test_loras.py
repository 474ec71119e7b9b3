"""LoRAs of a server's folder: named by requests, set before a batch, taken off after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.image import to_file
from runtime.pipeline import Pipeline
from runtime.serve.image_request import Limits, Refused, read_request
from runtime.serve.jobs import Job
from runtime.serve.service import Service
from tests.tiny.lora import factors, peft, write
from tests.tiny.pipeline import tiny_transformer


def test_a_request_names_what_the_folder_has(tiny_bundle: Path, tmp_path: Path) -> None:
    style = write(tmp_path / "loras" / "style.safetensors", peft(factors(tiny_transformer())))
    write(tmp_path / "loras" / "broken.safetensors", {})
    write(tmp_path / "secret.safetensors", peft(factors(tiny_transformer(), 1)))
    service = Service(tiny_bundle, "ort", threads=1, loras=style.parent)
    assert service.facts("x")["loras"] == ["broken", "style"]
    manifest = service.pipeline.manifest

    def wanted(folder: Path | None = service.loras, **lora: float) -> Any:
        fields = {"prompt": "a", "seed": 5, "steps": 2, "lora": lora}
        body = json.dumps(fields if lora else {**fields, "lora": None}).encode()
        return read_request(body, manifest, Limits(), loras=folder)

    def file(**lora: float) -> bytes:
        files, *_ = service.threads.images([Job(wanted(**lora))], 0)
        return files[0]

    pipeline = Pipeline(tiny_bundle, "ort", threads=1, loras={style: 0.5})
    asked: dict[str, Any] = {"seed": 5, "steps": 2}
    plain = to_file(Pipeline(tiny_bundle, "ort", threads=1)("a", **asked))
    assert file() == plain and file(style=0.5) == to_file(pipeline("a", **asked)) != plain
    assert file() == plain
    assert wanted(style=0.5).key is None and wanted().key is not None  # it shares no batch
    with pytest.raises(Refused, match="lora broken cannot be used with this model") as caught:
        file(broken=1.0)
    assert caught.value.status == 400 and str(tmp_path) not in caught.value.message
    for lora, sentence in (
        ({"../secret": 1.0}, "lora names '../secret', expected one of broken, style"),
        ({"style": 1000.0}, "expected -100 to 100"),
        ({str(i): 1.0 for i in range(9)}, "lora names 9 files, expected at most 8"),
    ):
        with pytest.raises(Refused, match=sentence) as caught:
            wanted(**lora)
        assert (caught.value.status, caught.value.param) == (400, "lora")
    with pytest.raises(Refused, match="lora is given, expected none"):
        wanted(None, style=1.0)
    with pytest.raises(ValueError, match="workers is 2, expected 1 with --loras"):
        Service(tiny_bundle, "ort", workers=2, loras=style.parent)
