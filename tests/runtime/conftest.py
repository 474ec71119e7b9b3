import shutil
from pathlib import Path
import pytest
ROOT = Path(__file__).resolve().parents[2] / ".pytest_cache/d/tiny-bundles"
def find(name):
    return [p for p in ROOT.glob(f"*/{name}") if (p / "manifest.json").is_file()][0]
@pytest.fixture(scope="session")
def tiny_bundle(): return find("sparse-bundle")
@pytest.fixture(scope="session")
def tiny_dense_bundle(): return find("dense-bundle")
