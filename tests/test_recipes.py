"""The recipes beside the documents: manifests for Kubernetes, and Ray Serve."""

import io
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cases.documents import ROOT, parse_d2m

yaml = pytest.importorskip("yaml")
MANIFESTS = sorted((ROOT / "docs" / "kubernetes").glob("*.yaml"))


def objects(path: Path) -> dict[str, Any]:
    """The documents of a file by their kind."""
    found = [row for row in yaml.safe_load_all(path.read_text()) if row]
    assert all(row["apiVersion"] and row["metadata"]["name"] for row in found)
    return {row["kind"]: row for row in found}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_pod_has_one_gpu_and_one_service_finds_all_of_them(path: Path) -> None:
    rows = objects(path)
    assert set(rows) == {"Deployment", "Service"}
    spec = rows["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["replicas"] > 1 and spec["selector"]["matchLabels"] == labels
    assert rows["Service"]["spec"]["selector"] == labels
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in rows["Service"]["spec"]["ports"]} <= set(ports)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_the_servers_command_and_probes_are_real() -> None:
    rows = objects(ROOT / "docs" / "kubernetes" / "serve.yaml")
    pod = rows["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = container["args"]
    parse_d2m(arguments)
    port = int(arguments[arguments.index("--port") + 1])
    assert port == container["ports"][0]["containerPort"]
    drain = int(arguments[arguments.index("--drain") + 1])
    assert pod["terminationGracePeriodSeconds"] > drain
    routes = re.findall(r'@get\("([^"]+)"', (ROOT / "runtime/serve/app.py").read_text())
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in routes
    files = [*(ROOT / "runtime").rglob("*.py"), ROOT / "d2m/cli/serve.py"]
    code = "".join(path.read_text() for path in files)
    for variable in container["env"]:
        assert f'"{variable["name"]}"' in code
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(arguments[1].startswith(f"{path}/") for path in mounts)


@pytest.mark.slow
def test_ray_serve_draws() -> None:
    """ray is no requirement of d2m; in an environment that has it, a replica on the CPU."""
    pytest.importorskip("ray.serve")
    from ray import serve

    from docs.ray_serve import app
    from tests.stand_ins.http import until

    serve.run(app)

    def post(body: Any) -> bytes:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request("http://127.0.0.1:8000/", data)
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: bytes = answer.read()
            return found

    def routed() -> bool:
        """The proxy is told of the application after `run` has returned."""
        try:
            with urllib.request.urlopen("http://127.0.0.1:8000/-/routes", timeout=10) as answer:
                return "/" in json.loads(answer.read())
        except OSError:
            return False

    try:
        until(routed)
        png = post({"prompt": "a photo of a red circle", "seed": 7, "steps": 2})
        assert Image.open(io.BytesIO(png)).size == (32, 32)
        assert png == post({"prompt": "a photo of a red circle", "seed": 7, "steps": 2})
        for wrong in ({"prompt": "a", "steps": 0}, {}, b"no json", [1]):
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(wrong)
            assert refused.value.code == 400
    finally:
        serve.shutdown()
