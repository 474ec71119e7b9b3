"""What an extra of d2m holds, and the command that installs it the way d2m was installed here."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

DISTRIBUTION = "dense2moe"
# Top-level module -> the extra that installs it.
EXTRAS = {
    "torch": "convert",
    "diffusers": "convert",
    "transformers": "convert",
    "accelerate": "convert",
    "matplotlib": "convert",
    "jinja2": "convert",
    "huggingface_hub": "convert",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "polygraphy": "export",
    "tensorrt_rtx": "trt-rtx",
    "tensorrt": "trt",
    "cuda": "trt-rtx",
    "fastapi": "serve",
    "uvicorn": "serve",
    "pydantic": "serve",
    "pydantic_core": "serve",
    "starlette": "serve",
    "prometheus_client": "serve",
    "datasets": "data",
    "cryptography": "sign",
    "gguf": "gguf",
}


def need(extra: str, said: str, error: ImportError | None = None) -> str:
    """The sentence for a missing extra: `said` (who needs what), the reason, and the cure."""
    reason = f" ({error})" if error else ""
    return f"{said}{reason}; install with: {command(extra)}"


def command(extra: str = "") -> str:
    """The pip command that installs `extra`; without one, d2m and what it cannot do without.

    As d2m is installed: from a folder (a clone), editable or not; from an address (an archive, a
    repository); or by its name from where pip looks. Sources that were never installed are a clone.
    """
    brackets = f"[{extra}]" if extra else ""
    try:
        text = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return f"pip install -e {_quoted(_folder(Path(__file__).parents[2]) + brackets)}"
    if text is None:
        return f"pip install {_quoted(DISTRIBUTION + brackets)}"
    record = json.loads(text)
    url = record["url"]
    if "dir_info" in record:
        editable = "-e " if record["dir_info"].get("editable") else ""
        folder = _folder(Path(url2pathname(urlsplit(url).path)))
        return f"pip install {editable}{_quoted(folder + brackets)}"
    if "vcs_info" in record:
        url = f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}"
    return f"pip install {_quoted(f'{DISTRIBUTION}{brackets} @ {url}')}"


def _folder(path: Path) -> str:
    """ "." where we are in it, as every page writes it."""
    return "." if path.resolve() == Path.cwd().resolve() else str(path)


def _quoted(requirement: str) -> str:
    return f"'{requirement}'" if set(requirement) & set("[] ") else requirement
