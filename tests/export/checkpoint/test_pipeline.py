"""What export does not compile yet is refused in one sentence, before anything is written."""

import json
import shutil
from pathlib import Path

import pytest

from export.bundle import export_bundle
from export.checkpoint.pipeline import open_pipeline


@pytest.mark.parametrize(("field", "value"), [("renormalise", True)])
def test_structures_that_cannot_be_compiled(
    tiny_sparse_dir: Path, tmp_path: Path, field: str, value: object
) -> None:
    source = tmp_path / "sparse"
    shutil.copytree(tiny_sparse_dir, source)
    config = source / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=f"has a transformer with {field} .* does not compile it"):
        export_bundle(source, tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse"]


def test_plain_sparse_models_pass(tiny_sparse_dir: Path) -> None:
    assert open_pipeline(tiny_sparse_dir)[2]
