"""The page: self-contained, under a strict policy, and working in a browser."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
import numpy as np
from PIL import Image

from runtime.image import settings_of
from runtime.serve.edits.edit_request import read_edit
from runtime.serve.page import read_page
from tests.stand_ins.browser import launched
from tests.stand_ins.http import running, until


def test_it_loads_nothing_from_elsewhere() -> None:
    page, policy = read_page()
    text = page.decode()
    assert not re.search(
        r"(src|href)\s*=|https?://|//\w+\.|@import|url\(|\son\w+=",
        text.replace('image.src = "data:image/png;base64," + item.b64_json;', ""),  # nor links
    )
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert policy.count("sha256-") == 2


def test_a_changed_script_has_another_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = read_page()
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: read(*a, **k).replace("begin();", ";"))
    assert read_page()[1] != before


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as started:
        yield started


@pytest.mark.browser
def test_a_person_generates_in_chromium(browser: Any, tmp_path: Path) -> None:
    with running(key="a-good-long-key") as (url, _):
        page = browser.new_page()
        told: list[str] = []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("#keylabel:not([hidden])")
        told.clear()  # the browser reports the 401 that asks for the key
        page.fill("#key", "a-good-long-key")
        page.press("#key", "Tab")  # the model's own settings are asked for
        until(lambda: page.inner_text("#title") == "d2m: shapes-s")
        page.click("#examples button:nth-child(3)")
        assert page.input_value("#prompt") == "three circles"
        assert page.get_attribute("#size", "placeholder") == "32x32"
        assert page.is_visible("#kappa") and not page.is_visible("#negative_prompt")
        page.fill("#prompt", "a photo of a red circle")
        page.fill("#steps", "4")
        page.fill("#n", "2")
        page.fill("#seed", "7")
        page.click("#generate")
        # Not wait_for_function: its polling is an eval, which the policy forbids.
        loaded = "[...document.images].filter(i => i.complete && i.naturalWidth).length"
        until(lambda: page.evaluate(loaded) == 2, 120)
        facts = facts_of(page)
        assert re.match(r"[\d.]+ s, of it [\d.]+ s generating", facts["time"])
        assert facts["blocks run"] == "48 of 72 in 4 steps"
        assert facts["experts used"] == "2 of 12 per token, beside the shared one"
        assert facts["seed"] == "7, 8" and "32x32" in facts["model"]
        assert page.evaluate("document.images[0].naturalWidth") == 32
        with page.expect_download() as download:
            page.click("#images a")
        assert download.value.suggested_filename == "seed-7.png"
        saved = tmp_path / "seed-7.png"
        download.value.save_as(saved)
        assert settings_of(saved)["seed"] == 7
        assert page.get_attribute("#progress", "max") == "4" and not page.is_visible("#progress")
        # Colours, so not an empty image: the red circle is there.
        assert page.evaluate(RED) > 20
        assert told == []
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert {re.sub(r"[?#].*", "", u)[: len(url)] for u in asked if u[:5] != "data:"} == {url}

        page.fill("#steps", "1000")
        page.click("#generate")
        until(lambda: page.inner_text("#error"))
        assert "expected a whole number from 1 to 100" in page.inner_text("#error")
        page.fill("#steps", "100")
        page.click("#generate")
        page.click("#stop")
        until(lambda: page.inner_text("#error") == "stopped")
        # The policy holds: nothing that is not the page's own runs.
        page.evaluate(INJECT)
        assert page.evaluate("window.injected") is None
        page.close()


@pytest.mark.browser
def test_a_negative_prompt_is_asked_for_where_the_family_takes_one(
    browser: Any, tiny_guided_bundle: Path, tmp_path: Path
) -> None:
    with running(bundle=tiny_guided_bundle) as (url, _):
        page = browser.new_page()
        page.goto(url)
        until(lambda: page.is_visible("#negative_prompt"))
        assert not page.is_visible("#kappa") and not page.is_visible("#key")
        page.fill("#guidance", "4")
        page.fill("#steps", "2")
        page.fill("#seed", "3")
        sources = []
        for negative in ("", "a black star", ""):
            page.fill("#prompt", "a red circle")
            page.fill("#negative_prompt", negative)
            page.click("#generate")
            until(lambda: page.is_enabled("#generate") and page.query_selector("#images img"))
            sources.append(page.evaluate(f"({PIXELS})()"))
            assert page.inner_text("#error") == ""
        assert sources[0] == sources[2] != sources[1]
        assert facts_of(page)["experts used"] == "none: a dense model"
        page.screenshot(path=tmp_path / "negative.png", full_page=True)
        page.close()


@pytest.mark.browser
def test_a_person_changes_a_part_of_an_image(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms: list[dict[str, list[bytes]]] = []

    def keep(form: Any, service: Any) -> Any:
        forms.append({name: list(files) for name, files in form.files.items()})
        return read_edit(form, service)

    monkeypatch.setattr("runtime.serve.app.read_edit", keep)
    with running() as (url, _):
        page = browser.new_page()
        told: list[str] = []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto(url)
        until(lambda: page.is_visible("#drop"))
        page.fill("#steps", "3")
        page.fill("#seed", "7")
        page.dispatch_event("#prompt", "drop", {"dataTransfer": page.evaluate_handle(DROPPED)})
        until(lambda: page.is_visible("#source"))
        assert page.input_value("#strength") == "0.6"
        box = page.locator("#mask").bounding_box()
        side, x, y = box["width"], box["x"], box["y"]
        page.evaluate("document.getElementById('brush').value = 96")
        for column in (0.75, 0.9):  # two strokes down the right of the image
            page.mouse.move(x + column * side, y + 0.1 * side)
            page.mouse.down()
            page.mouse.move(x + column * side, y + 0.9 * side, steps=4)
            page.mouse.up()
        assert page.input_value("#strength") == "1"
        page.screenshot(path=tmp_path / "mask.png", full_page=True)
        page.fill("#prompt", "a photo of a red circle")
        page.click("#generate")
        until(lambda: page.query_selector("#images img"), 120)
        assert page.inner_text("#error") == "" and told == []
        assert facts_of(page)["changed"] == "strength 1, where the mask says"
        mask = np.asarray(Image.open(io.BytesIO(forms[0]["mask"][0])))
        assert mask.shape == (32, 32, 4)  # as large as the image, and transparent where painted
        assert (mask[8:24, 23:31, 3] == 0).all() and (mask[:, :16, 3] == 255).all()

        slider = page.locator("#images input[type=range]")
        slider.evaluate("s => { s.value = 25; s.dispatchEvent(new Event('input')); }")
        assert "75%" in page.evaluate("document.images[0].style.clipPath")
        assert page.evaluate("document.querySelector('#images canvas').width") == 32  # that before
        page.screenshot(path=tmp_path / "compared.png", full_page=True)
        page.click("#images button")  # what was made is what is changed next
        until(lambda: page.input_value("#strength") == "0.6")
        page.click("#remove")
        assert not page.is_visible("#source") and told == []
        page.close()


DROPPED = """async () => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 32;
  canvas.getContext("2d").fillRect(4, 4, 24, 24);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve));
  const data = new DataTransfer();
  data.items.add(new File([blob], "a.png", {type: "image/png"}));
  return data;
}"""


PIXELS = """async () => {
  const canvas = document.createElement("canvas"), image = document.images[0];
  await image.decode();
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data].join();
}"""


RED = """() => {
  const canvas = document.createElement("canvas"), image = document.images[0];
  canvas.width = canvas.height = 32;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, 32, 32).data;
  let red = 0;
  for (let i = 0; i < data.length; i += 4) red += data[i] > data[i + 1] + 60;
  return red;
}"""
INJECT = """() => {
  const script = document.createElement("script");
  script.textContent = "window.injected = 1";
  document.body.append(script);
}"""


def facts_of(page: Any) -> dict[str, str]:
    """The table under the images."""
    script = (
        "[...document.querySelectorAll('#facts tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    return dict(page.evaluate(script))
