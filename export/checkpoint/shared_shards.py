"""`d2m export --link`: weights that a bundle takes as they are, shared with the checkpoint on disk.

A shard of which every tensor enters the bundle unchanged (name, type, layout: the experts, which
`d2m convert --init-only --importance ...` writes into shards of their own) becomes a hard link: one
file under two names, so neither directory needs the other and no byte is stored twice. It is
an option and not the default, since a program that rewrites the checkpoint's file in place (as
safetensors' save_file does; d2m itself never does) would rewrite the bundle's too (its hash then
says so), and since onnx.load takes a file of two names for an attack. ONNX Runtime reads it, and a
copy of the bundle is a bundle without links.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.checkpoint.weights import Checkpoint, Placed

log = logging.getLogger("export")
# What a file system says to a link that it cannot make: another disk, no links, too many, no right.
REFUSALS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES)


def whole_shards(checkpoint: Checkpoint, placed: Sequence[Placed]) -> list[str]:
    """Files of the checkpoint that hold nothing but tensors placed exactly as they are stored."""
    same = {
        row.name
        for row in placed
        if row.sources == (row.name,)
        and row.name in checkpoint.shapes()  # not made by export itself
        and not row.transposed
        and row.dtype == checkpoint.dtype(row.name)
        and row.shape == checkpoint.shapes()[row.name]
    }
    return [file for file, inside in checkpoint.files().items() if same.issuperset(inside)]


def link_shards(
    folder: Path, component: str, checkpoint: Checkpoint, placed: Sequence[Placed]
) -> tuple[list[str], list[Placed]]:
    """Link what can be linked into `folder`; returns the links' names and what is still to write.

    Where the file system refuses a link, the tensors are written, and the log says why.
    """
    names: list[str] = []
    taken: set[str] = set()
    inside = checkpoint.files()
    for number, file in enumerate(whole_shards(checkpoint, placed), 1):
        name = f"{component}.shard-{number:05d}.safetensors"
        try:
            os.link((checkpoint.directory / file).resolve(), folder / name)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            log.warning("%s cannot be linked (%s): its tensors are copied", file, error.strerror)
            continue
        names.append(name)
        taken.update(inside[file])
    return names, [row for row in placed if row.name not in taken]
