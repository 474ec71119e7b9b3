"""Importing the runtime is quick, and a whole run imports nothing of the torch or onnx world."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnxscript", "polygraphy")
OURS = ("d2m", "calib", "export")


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter that sees this project."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_half_a_second() -> None:
    # Of a processor: what runs beside the tests lengthens only the clock's time.
    code = "import time; t = time.process_time(); import runtime; print(time.process_time() - t)"
    times = [float(python(code)) for _ in range(5)]
    assert statistics.median(times) < 0.5, times


def test_import_loads_no_library() -> None:
    names = json.loads(python("import sys, json, runtime; print(json.dumps(sorted(sys.modules)))"))
    assert not {"numpy", "onnxruntime", "tokenizers", "PIL", *HEAVY} & set(names)


def test_a_whole_run_is_free_of_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys, json, runtime\n"
        "from runtime.image import save\n"
        "from runtime.inspect.directory import inspect\n"
        "image = runtime.run('a red circle', sys.argv[1], steps=2, top_k=[1, 2])\n"
        "save(image, sys.argv[2]); inspect(sys.argv[1])\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    names = set(json.loads(python(code, str(tiny_bundle), str(tmp_path / "a.png"))))
    assert not names & {*HEAVY, *OURS}
    assert (tmp_path / "a.png").stat().st_size > 100
