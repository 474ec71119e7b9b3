"""The workflow in ComfyUI's own page, where its package and a Chromium are installed."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from runtime.serve.server import listen
from tests.stand_ins.browser import launched
from tests.stand_ins.comfyui import CORE, comfyui, load_pack, object_info, prompt_of
from tests.stand_ins.http import until

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "docs/comfyui/workflow.json"
# What the page asks for before it shows anything.
SYSTEM = {"comfyui_version": "0.3", "python_version": "3.11", "os": "posix", "argv": []}
ANSWERS: dict[str, Any] = {
    "users": {"storage": "server", "migrated": True},
    "settings": {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.58.1"},
    "system_stats": {"system": SYSTEM, "devices": []},
    "prompt": {"exec_info": {"queue_remaining": 0}},
    "queue": {"queue_running": [], "queue_pending": []},
    "jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 1, "total": 0, "has_more": False}},
    **{name: [] for name in ("userdata", "extensions", "embeddings", "experiment/models")},
    **{name: {} for name in ("i18n", "features", "history", "global_subgraphs")},
}


@contextmanager
def comfyuis_page(static: Path, info: dict[str, Any]) -> Iterator[str]:
    """The address of ComfyUI's page, with `info` as the nodes of its server."""

    async def api(request: Request) -> Response:
        answers = {**ANSWERS, "object_info": info}
        path = request.path_params["path"]
        return JSONResponse(answers.get(path, {}), 200 if path in answers else 404)

    routes = [Route("/api/{path:path}", api), Mount("/", StaticFiles(directory=static, html=True))]
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.mark.browser
def test_comfyuis_page_reads_the_workflow(tmp_path: Path) -> None:
    """Every value arrives under its name, and what is switched off is gone round."""
    package = importlib.util.find_spec("comfyui_frontend_package")
    if package is None or package.origin is None:
        pytest.skip("no ComfyUI page: pip install comfyui-frontend-package")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "style.safetensors").touch()
    workflow = json.loads(WORKFLOW.read_text())
    with comfyui(tmp_path), launched() as browser:
        pack = load_pack(ROOT / "comfyui")
        nodes = {**pack.NODE_CLASS_MAPPINGS, **CORE}
        info = object_info(nodes, pack.NODE_DISPLAY_NAME_MAPPINGS)
        with comfyuis_page(Path(package.origin).parent / "static", info) as url:
            page = browser.new_page(viewport={"width": 1760, "height": 1000})
            page.goto(url, timeout=120_000)
            until(lambda: page.evaluate("Boolean(window.app?.graph && window.app.canvas)"), 120)
            page.evaluate("async (workflow) => window.app.loadGraphData(workflow)", workflow)
            made = page.evaluate("async () => (await window.app.graphToPrompt()).output")
            page.wait_for_timeout(1000)
            page.screenshot(path=tmp_path / "comfyui.png")
            page.close()
        for row in made.values():
            row.pop("_meta")
        assert made == prompt_of(workflow, nodes)
