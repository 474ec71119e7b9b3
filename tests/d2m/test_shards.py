"""Checkpoints in shards."""

from pathlib import Path

import pytest

from d2m import shards


def test_a_library_that_cannot_write_raises_oserror(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    with pytest.raises(OSError, match="No such file") as caught, shards.library_errors():
        save_file({"x": torch.zeros(1)}, tmp_path / "none" / "x.safetensors")
    assert caught.value.errno == 2
