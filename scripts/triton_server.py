"""A model repository of `d2m export --triton-repo` on NVIDIA's own server, asked by its own client.

    python3.11 -m venv E && E/bin/pip install 'numpy<2' nvidia-pytriton 'tritonclient[grpc]' \\
        onnxruntime tokenizers pillow ml_dtypes && E/bin/pip install --no-deps .
    E/bin/python -m scripts.triton_server REPOSITORY [--json FILE]

nvidia-pytriton has the server and its Python backend, for CPUs, of one release. Checked: the model
loads; an image has the very bytes that the runtime generates; requests that come together share a
batch; what is wrong is refused with its sentence; a request that its client gave up costs no time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import runtime

PROMPT, SEED, STEPS = "a photo of a red circle", 7, 2
KINDS = {"prompt": ("BYTES", object), "seed": ("INT64", np.int64)}
WRONG = {"steps": 0, "top_k": 99, "height": 33}


def main() -> int:
    """Start the server, ask, print and write the answer; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", type=Path)
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_args()
    [config] = given.repository.glob("*/config.pbtxt")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        process = start(given.repository.resolve(), Path(folder), port)
        try:
            answer = ask(port, config.parent)
        except TimeoutError:
            print(Path(folder, "log").read_text("utf-8", "replace")[-4000:])
            raise
        finally:
            process.terminate()
            process.wait(60)
    print(answer)
    if given.json:
        from runtime.files.atomic import write_json

        names = ("nvidia-pytriton", "tritonclient", "numpy", "onnxruntime")
        write_json(
            given.json,
            {"command": "python -m scripts.triton_server REPOSITORY"}
            | {name: version(name) for name in names}
            | answer,
        )
    return int(not all(value for value in answer.values() if isinstance(value, bool)))


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start(repository: Path, folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The server, asked by gRPC alone. It looks for a stub of this Python beside its backend."""
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None and spec.origin, "nvidia-pytriton is not installed"
    package = Path(spec.origin).parent / "tritonserver"
    shutil.copytree(package / "backends", folder / "backends")
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = "triton_python_backend_stub"
    shutil.copy(package / "python_backend_stubs" / this / name, folder / "backends/python" / name)
    # The stub embeds the Python that comes first on PATH, and ignores PYTHONPATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # It finds the wheel's libraries from its old place, and Python's not at all.
    places = [str(sysconfig.get_config_var("LIBDIR")), *map(str, package.parents[1].glob("*.libs"))]
    libraries = os.pathsep.join(places)
    command = [str(package / "bin/tritonserver"), f"--model-repository={repository}"]
    command += [f"--backend-directory={folder / 'backends'}", f"--grpc-port={port}"]
    command += ["--grpc-address=127.0.0.1", "--allow-http=false", "--allow-metrics=false"]
    environment = os.environ | {"PATH": path, "LD_LIBRARY_PATH": libraries}
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def ask(port: int, model: Path) -> dict[str, Any]:
    """The checks, by name."""
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    client = grpc.InferenceServerClient(f"127.0.0.1:{port}")

    def inputs(**values: Any) -> list[Any]:
        found = []
        for name, value in values.items():
            kind, dtype = KINDS.get(name, ("INT32", np.int32))
            one = grpc.InferInput(name, [1, 1], kind)
            one.set_data_from_numpy(np.array([[value]], dtype))
            found.append(one)
        return found

    def image(**values: Any) -> np.ndarray:
        pixels: np.ndarray = client.infer(model.name, inputs(**values)).as_numpy("image")[0]
        return pixels

    wait_for(client, model.name)
    told = client.get_server_metadata()
    pipeline = runtime.load(model / "1/bundle", "ort")
    expected = {
        seed: np.asarray(pipeline(PROMPT, seed=seed, steps=STEPS)) for seed in range(SEED, SEED + 4)
    }
    answer: dict[str, Any] = {"server": f"{told.name} {told.version}"}
    one = image(prompt=PROMPT, seed=SEED, steps=STEPS)
    answer["same bytes as the runtime"] = bool((one == expected[SEED]).all())
    images: dict[int, np.ndarray] = {}

    def together(seed: int) -> None:
        images[seed] = image(prompt=PROMPT, seed=seed, steps=STEPS)

    threads = [threading.Thread(target=together, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer["same bytes in a batch"] = all((images[s] == expected[s]).all() for s in expected)
    rows = client.get_inference_statistics(model.name).model_stats[0].batch_stats
    answer["largest batch"] = int(max(row.batch_size for row in rows))
    refused = {}
    for name, value in WRONG.items():
        try:
            image(prompt=PROMPT, **{name: value})
        except InferenceServerException as error:
            refused[name] = f"{error.status()}: {error.message()}"
    answer["refused with its sentence"] = all(
        refused.get(name, "").startswith(
            f"StatusCode.INVALID_ARGUMENT: {name} is {value}, expected"
        )
        for name, value in WRONG.items()
    )
    done = threading.Event()
    call = client.async_infer(model.name, inputs(prompt=PROMPT, steps=100), lambda *_: done.set())
    time.sleep(0.5)
    call.cancel()
    done.wait(60)
    began = time.monotonic()
    image(prompt=PROMPT, steps=1)
    answer["seconds of an image after one that was given up"] = round(time.monotonic() - began, 2)
    return answer


def wait_for(client: Any, model: str) -> None:
    """Until the model is ready; TimeoutError after a minute."""
    from tritonclient.utils import InferenceServerException

    for _ in range(120):
        try:
            if client.is_model_ready(model):
                return
        except InferenceServerException:
            pass
        time.sleep(0.5)
    raise TimeoutError("the server's model is not ready after a minute")


if __name__ == "__main__":
    raise SystemExit(main())
