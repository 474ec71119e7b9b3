"""The report: numbers in, one page out that loads nothing, runs nothing and escapes everything."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from d2m.recipe.recipe import preset, to_dict
from d2m.report.build import build_report, data_uri, importance_curve, thin, write_report
from d2m.report.page import render
from d2m.report.training import experts
from d2m.units import duration, percent, power
from runtime.files.parameters import count

VOID = ("meta", "img", "br", "col")  # elements without a closing tag

SITES = ["transformer_blocks.0.ff", "transformer_blocks.0.ff_context"]
SITES += [f"single_transformer_blocks.{i}.proj_mlp" for i in range(2)]
FEATURES = [f"{site.rsplit('.', 1)[0]}.{s}" for site in SITES[1:] for s in ("text", "image")][:-2]
RATE = {"score": 0.84, "low": 0.808, "high": 0.867, "n": 600}
SCORE = {
    "suite": "shapes",
    "n": 600,
    "seed": 0,
    "overall": RATE,
    "categories": {"two_object": RATE},
}
FIGURES = {"load": [1 / 12] * 12, "entropy": 1.0, "busiest": 1.0, "dead": 0}


def lines():
    history = []
    for index, stage in enumerate(("shared", "experts")):
        for step in (10, 20, 30):
            done = 30 * index + step
            line = {"stage": stage, "index": index, "step": step, "done": done, "lr": 1e-3 / step}
            line |= {
                "output": 1 / done,
                "feature": 1 / done,
                "features": dict.fromkeys(FEATURES, 0.5),
            }
            if index:
                experts = {site: {"share": [1 / 12] * 12, "entropy": 0.9} for site in SITES}
                experts[SITES[1]]["entropy"] = 0.5
                line |= {"balance": 1.0 + 1 / step, "experts": experts, "dead": 3}
            history.append(line)
    return history


def everything(**changes):
    image = Image.new("RGB", (4, 4), "red")
    facts = {
        "name": "shapes-L",
        "base_model": "models/shapes-dense",
        "recipe": to_dict(preset("L")),
        "parameters": {
            "dense": count({"w": (100, 10)}),
            "sparse": count(
                {
                    "b.ff.experts.w1": (12, 4, 1),
                    "b.ff.experts.w2": (12, 1, 4),
                    "b.ff.shared.fc1.weight": (4, 4),
                    "b.ff.shared.fc2.weight": (4, 4),
                },
                2,
            ),
        },
        "history": lines(),
        "importance": {site: torch.arange(64.0) for site in SITES},
        "routing": {
            "top_k": 2,
            "edges": [0.0, 0.5, 1.0],
            "layers": {site: {"all": FIGURES, "buckets": [FIGURES] * 2} for site in SITES},
        },
        "images": [{"prompt": "a red circle", "seed": 7, "dense": image, "sparse": image}],
        "scores": {"dense": SCORE, "sparse": SCORE},
        "timings": {"importance": 12.0, "stage shared": 200.0},
        "identity_error": 2.34e-7,
    }
    return build_report(**(facts | changes))


class Page(HTMLParser):
    """Checks nesting; collects tags, attributes and text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.values, self.words = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def whole():
    return Page(render(everything()))


def test_page_has_every_section(whole):
    page = whole
    for title in ("Images", "Scores", "Training", "Experts", "Importance of neurons", "Recipe"):
        assert title in page.words, title
    assert {"Parameters", "Time"} <= set(page.words)
    for words in ("0.808 – 0.867", "2.3·10⁻⁷", "share of images judged right", "3 min 20 s"):
        assert words in page.text, words
    assert "two object" in page.text and "a red circle seed 7" in page.text
    assert page.tags.count("img") == 2
    assert page.text.count("training step") >= 5  # every curve names its axis


def test_page_loads_and_runs_nothing(whole):
    page = whole
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for tag, name, value in page.values:
        assert not name.startswith("on") and name not in ("href", "srcset"), tag
        assert name != "xlink:href" or value.startswith("#")  # a mark of the same drawing
        assert value is None or value.replace("url(#", "").count("url(") == 0
        assert name != "src" or value.startswith("data:image/png;base64,")
    [style] = [words for words in page.words if ":root" in words]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;"]
)
def test_text_from_outside_is_escaped(evil):
    recipe = to_dict(preset("L"))
    recipe["stages"][0]["name"] = evil
    history = [line | {"stage": evil if line["index"] == 0 else "x"} for line in lines()]
    image = Image.new("RGB", (2, 2))
    report = everything(
        name=evil,
        base_model=evil,
        recipe=recipe | {"name": evil},
        history=history,
        images=[{"prompt": evil, "seed": 0, "dense": image, "sparse": image}],
        scores={"dense": SCORE | {"suite": evil, "categories": {evil: RATE}}},
        timings={evil: 1.0},
    )
    page = Page(render(report))
    assert "script" not in page.tags and page.tags.count("img") == 2
    assert page.text.count(evil) >= 8
    alts = [value for _, name, value in page.values if name == "alt"]
    assert alts == [f"{evil} (dense)", f"{evil} (sparse)"]


@pytest.mark.parametrize("source", ["https://example.org/a.png", "data:text/html;base64,AA", "x"])
def test_images_must_be_png_data(source):
    images = [{"prompt": "p", "seed": 0, "dense": source, "sparse": source}]
    with pytest.raises(ValueError, match="the dense image of 'p' is .*expected a PNG data URI"):
        render(everything(images=images))


def test_what_is_missing_is_left_out():
    nothing = {"history": (), "importance": None, "routing": None, "images": (), "scores": None}
    page = Page(render(everything(**nothing, timings=None, identity_error=None)))
    titles = {"Images", "Scores", "Training", "Experts", "Importance of neurons", "Time"}
    assert not titles & set(page.words) and {"Recipe", "Parameters"} <= set(page.words)


def test_layers_that_no_token_reached_have_no_load_to_show():
    layers = {site: {"all": FIGURES | {"tokens": 9}, "buckets": [FIGURES]} for site in SITES}
    nothing = FIGURES | {"tokens": 0, "load": [0.0] * 12, "busiest": 0.0, "dead": 12}
    layers[SITES[-1]] = {"all": nothing, "buckets": [nothing]}
    part = experts(everything(routing={"top_k": 2, "edges": [0.0, 1.0], "layers": layers}))
    assert "1.0 times on the mean" in part.note
    loads, evenness = (chart.svgs[0] for chart in part.charts)
    cells = [len(re.findall(r"fill: var\(--[ds]\d+\)", chart)) for chart in (loads, evenness)]
    assert cells == [3 * 2 * 12, 3 * 2]


def test_untrained_and_stage_one_only():
    recipe = to_dict(preset("L"))
    page = Page(render(everything(recipe=recipe | {"stages": []}, history=())))
    assert "No training" in page.text
    page = Page(render(everything(history=lines()[:3])))
    assert "Load balance" not in page.text and "Output error" in page.text
    Page(render(everything(history=lines()[:1])))  # a single point


def test_write_report_writes_both_and_the_same_twice(tmp_path):
    path = write_report(tmp_path / "a", everything())
    write_report(tmp_path / "b", everything())
    assert path == tmp_path / "a" / "report.html"
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert render(report) == path.read_text("utf-8")  # the page is a function of the JSON
    with pytest.raises(ValueError):
        write_report(tmp_path / "c", everything(identity_error=float("nan")))
    assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------- numbers


def test_importance_curve_by_hand():
    curve = importance_curve([1.0, 5.0, 3.0, 1.0])  # ranked 5 3 1 1 of 10
    assert len(curve) == 101 and curve[0] == 0 and curve[100] == 1
    assert (curve[25], curve[50], curve[75]) == (0.5, 0.8, 0.9)
    assert curve[10] == pytest.approx(0.2)  # 0.4 of the first neuron
    assert importance_curve(torch.zeros(8))[-1] == 0
    assert all(a <= b for a, b in zip(curve, curve[1:]))


def test_thin_keeps_layers_at_the_ends_of_stages():
    kept = thin(lines())
    assert ["features" in line for line in kept] == [True, False, True] * 2
    assert ["experts" in line for line in kept] == [False] * 3 + [True, False, True]
    assert all(line["feature_error"] == pytest.approx(0.5) for line in kept)
    assert kept[4]["entropy"] == {"mean": pytest.approx(0.8), "least": 0.5}
    assert "entropy" not in kept[0]


def test_data_uri_is_the_picture():
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    uri = data_uri(image)
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert list(Image.open(io.BytesIO(data)).convert("RGB").tobytes()) == [1, 2, 3] * 6
    assert data_uri(uri) == uri


def test_quantities_in_words():
    assert [duration(s) for s in (2.44, 200, 3900)] == ["2.4 s", "3 min 20 s", "1 h 5 min"]
    assert power(0.0) == "0" and power(1e-5) == "1.0·10⁻⁵"
    assert percent(0.287) == "29 %" and percent(0.287, 1) == "28.7 %"
