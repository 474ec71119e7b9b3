"""`d2m export --triton-repo`: a model repository for NVIDIA Triton Inference Server.

    DIR/NAME/config.pbtxt   inputs, outputs, batching, instances
    DIR/NAME/1/model.py     the server's Python backend, which calls runtime.serve.triton
    DIR/NAME/1/bundle/      the bundle, as hard links where both lie on one file system

The same bundle and options give the same bytes. Nothing but NAME is touched in DIR.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from export.checkpoint.shared_shards import REFUSALS
from runtime.bundle.directory import Bundle, open_bundle
from runtime.bundle.signature import FILE as SIGNATURE
from runtime.files.atomic import replace_dir, temporary_dir, write_text

log = logging.getLogger("export")
MARK = 'key: "d2m_bundle"'  # in every config.pbtxt of ours
# Name, type, shape of one image's; all but the prompt may be left out.
INPUTS = (
    ("prompt", "TYPE_STRING", "1"),
    ("seed", "TYPE_INT64", "1"),
    ("steps", "TYPE_INT32", "1"),
    ("guidance", "TYPE_FP32", "1"),
    ("height", "TYPE_INT32", "1"),
    ("width", "TYPE_INT32", "1"),
    ("top_k", "TYPE_INT32", "-1"),
    ("kappa", "TYPE_INT32", "-1"),
    ("sigmas", "TYPE_FP32", "-1"),
    ("negative_prompt", "TYPE_STRING", "1"),
)
OUTPUTS = (("png", "TYPE_STRING", "1"), ("image", "TYPE_UINT8", "-1, -1, 3"))
MODEL = '''"""Generates from the bundle in this directory; written by d2m export --triton-repo."""

from pathlib import Path

import triton_python_backend_utils as pb_utils

from runtime.serve.triton import Model


class TritonPythonModel:
    """What the server's Python backend calls."""

    def initialize(self, args):
        """Open the bundle; the model is ready when this returns."""
        self.model = Model(pb_utils, args, Path(__file__).parent)

    def execute(self, requests):
        """A response for every request."""
        return self.model.execute(requests)

    def finalize(self):
        """Release the weights."""
        self.model = None
'''


def write_repository(
    bundle: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    instances: int = 1,
    max_batch: int = 8,
    at: str | None = None,
) -> dict[str, Any]:
    """Write the model into `repository`, in place of one of the same name that came from here.

    Args:
        instances: processes that generate: of every GPU where it has plans, else of the CPU.
            Each has the weights in memory.
        max_batch: images generated together, 1 to 64.
        at: where the server finds the bundle; None: it is put into the repository.

    Returns repository, model, files, and the bytes linked and copied.

    Raises FileNotFoundError or ValueError with one sentence where the bundle cannot be used, a
    number is out of range or something else has the name; OSError where the disk is full.
    """
    check_options(instances, max_batch, at)
    opened = open_bundle(bundle)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", opened.name).strip("-") or "d2m"
    repository = Path(repository)
    final = repository / name
    check_ours(final)
    if final.resolve().is_relative_to(opened.path.resolve()):
        raise ValueError(f"{final} lies inside the bundle, expected another directory.")
    repository.mkdir(parents=True, exist_ok=True)
    # Beside the repository, not in it: a server that polls would take it for a model.
    linked = copied = 0
    with temporary_dir(repository) as folder:
        write_text(folder / "config.pbtxt", config(opened, name, instances, max_batch, at))
        write_text(folder / "1" / "model.py", MODEL)
        if at is None:
            linked, copied = place(opened, folder / "1" / "bundle")
        files = sum(path.is_file() for path in folder.rglob("*"))
        replace_dir(folder, final)
    return {
        "repository": str(repository),
        "model": name,
        "files": files,
        "linked_bytes": linked,
        "copied_bytes": copied,
    }


def check_options(instances: int, max_batch: int, at: str | None) -> None:
    """Refuse what cannot work before anything is exported."""
    for option, value, most in (
        ("--triton-instances", instances, 64),
        ("--triton-batch", max_batch, 64),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{option} is {value}, expected 1 to {most}.")
    if at is not None and not PurePosixPath(at).is_absolute():
        raise ValueError(f"--triton-bundle is {at!r}, expected an absolute path of the server's.")


def check_ours(final: Path) -> None:
    """Refuse to replace what is not from here."""
    if not os.path.lexists(final):
        return
    source = final / "config.pbtxt"
    if not source.is_file() or MARK not in source.read_text("utf-8", "replace"):
        raise ValueError(
            f"{final} exists and is no model of d2m, expected a new name or one to replace; choose"
            " another --triton-repo."
        )


def place(bundle: Bundle, folder: Path) -> tuple[int, int]:
    """The bundle's files in `folder`; bytes linked, and copied where links are impossible."""
    names = ["manifest.json", *bundle.manifest["files"]]
    if (bundle.path / SIGNATURE).is_file():
        names.append(SIGNATURE)
    linked = copied = 0
    refused = ""
    for name in names:
        source, target = (bundle.path / name).resolve(), folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = source.stat().st_size
        if not refused:
            try:
                os.link(source, target)
                linked += size
                continue
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
                refused = str(error.strerror)
                log.warning("%s cannot be linked (%s): files are copied", name, refused)
        shutil.copyfile(source, target)
        copied += size
    return linked, copied


def config(bundle: Bundle, name: str, instances: int, max_batch: int, at: str | None) -> str:
    """config.pbtxt, protobuf's text format of the server's ModelConfig."""
    plans = bundle.manifest.get("plans", {}).values()
    profiles = [row["profiles"] for row in plans if "batch" in row.get("profiles", {})]
    batch = min([max_batch, *(each["batch"][2] for each in profiles)])
    kind = "KIND_GPU" if plans else "KIND_CPU"
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {batch}",
        *tensors("input", INPUTS),
        *tensors("output", OUTPUTS),
        f"instance_group [ {{ count: {instances} kind: {kind} }} ]",
        "# Requests wait this long for others to share a batch, and in all no longer than the",
        "# timeout; a client may ask for less. More than max_queue_size are refused at once.",
        "dynamic_batching {",
        "  max_queue_delay_microseconds: 5000",
        "  default_queue_policy {",
        "    timeout_action: REJECT",
        "    default_timeout_microseconds: 120000000",
        "    allow_timeout_override: true",
        "    max_queue_size: 64",
        "  }",
        "}",
        "# Where the bundle lies, from model.py's directory; backend auto, ort, trt-rtx or trt;",
        "# max_pixels and threads: empty for the runtime's own choice.",
    ]
    parameters = {
        "d2m_bundle": at or "bundle",
        "backend": "auto",
        "threads": "",
        "max_steps": "100",
        "max_pixels": "",
    }
    for key, value in parameters.items():
        text = value.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}')
    return "\n".join(lines) + "\n"


def tensors(field: str, rows: tuple[tuple[str, str, str], ...]) -> list[str]:
    """The inputs or outputs, one a line."""
    found = []
    for name, kind, dims in rows:
        optional = " optional: true" if field == "input" and name != "prompt" else ""
        found.append(f'{field} {{ name: "{name}" data_type: {kind} dims: [ {dims} ]{optional} }}')
    return found
