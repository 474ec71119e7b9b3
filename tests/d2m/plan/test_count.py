"""Plans against the published figures, the formulas of the method, real models and bad input."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from d2m.convert.sparse_pipeline import shapes_of
from d2m.plan.count import plan
from d2m.plan.presets import ANY_DEPTH
from d2m.plan.tables import conclusion, figure, table
from runtime.files.parameters import count

ROOT = Path(__file__).resolve().parents[3]
# read: activated parameters (10^9), FLOPs (10^12) and their share of the dense model's.
PUBLISHED = {
    "L": (5.147, 49.61, 0.667),
    "M": (3.957, 37.43, 0.503),
    "S": (3.163, 30.47, 0.410),
    "XS": (2.634, 23.51, 0.316),
}


def test_flux_dev_dense():
    answer = plan("flux-dev")
    assert answer["total_params"] == answer["activated_params"] == 11_901_408_320
    assert answer["flops"] == 74_384_653_418_496 == answer["dense"]["flops"]
    assert answer["flops_vs_dense"] == answer["ffn_activated_share"] == 1.0
    assert (answer["height"], answer["width"], answer["text_tokens"]) == (1024, 1024, 512)
    assert answer["image_tokens"] == 4096 and answer["top_k"] is None and answer["recipe"] is None
    assert answer["memory"]["bf16"] == 2 * 11_901_408_320


@pytest.mark.parametrize(
    ("blocks", "total"), [("8D+38S", 8_163_264_064), ("5d + 10s", 3_179_199_552)]
)
def test_flux_dev_with_fewer_blocks(blocks, total):
    answer = plan("flux-dev", blocks=blocks)
    assert answer["total_params"] == total
    assert answer["dense"]["params"] == 11_901_408_320


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_come_to_the_published_figures(name):
    activated, flops, share = PUBLISHED[name]
    answer = plan("flux-dev", preset=name)
    assert answer["activated_params"] == pytest.approx(activated * 1e9, rel=1e-3)
    assert answer["flops"] == pytest.approx(flops * 1e12, rel=1e-3)
    assert answer["flops_vs_dense"] == pytest.approx(share, abs=1e-3)
    assert answer["ffn_activated_share"] == 0.375


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("k", [1, 2, 12])
def test_presets_follow_the_formulas_of_the_method(name, k):
    """The closed formulas (derived), written down here a second time."""
    answer = plan("flux-dev", preset=name, top_k=k)
    d, t, n = 3072, 512, 4608
    x, y = (row["active"] for row in answer["blocks"].values())
    groups = sum(row["groups"] for row in answer["blocks"].values())
    ffn = (2 * d**2 + 2 * d) + k * (d**2 // 2 + d // 4) + 12 * d
    adaln = 6 * (d**2 + d) + (12 * x + 3 * y) * d
    total = 64_124_992 + x * (8 * d**2 + 8 * d + 512 + 2 * ffn) + y * (4 * d**2 + 3 * d + 256 + ffn)
    assert answer["activated_params"] == total + adaln + groups * 9 * d
    block = (8 + 4 * (1 + k / 4)) * d**2 * n + 4 * d * n**2 + 24 * d * n
    ends = 256 * d * 4096 + 8192 * d * t + 2 * (2 * 256 + 768 + 3 * d + 2 * d) * d
    assert answer["flops"] == (x + y) * block + ends + 12 * d**2 + groups * 18 * d


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_presets_keep_the_papers_order(name):
    answer = plan(ROOT / "models/shapes-dense", preset=name)
    assert answer["ffn_activated_share"] == 0.375
    assert (answer["height"], answer["image_tokens"], answer["text_tokens"]) == (32, 16, 16)
    active = sum(row["active"] for row in answer["blocks"].values())
    assert active == {"L": 18, "M": 14, "S": 12, "XS": 8}[name]


def test_components_add_up():
    answer = plan("flux-dev", preset="S")
    for key, field in (("params", "total_params"), ("activated", "activated_params")):
        assert sum(row[key] for row in answer["components"].values()) == answer[field]
    assert sum(row["flops"] for row in answer["components"].values()) == answer["flops"]
    assert set(answer["components"]) == {
        *("embedders", "double_attention", "double_ffn", "single_attention", "single_ffn"),
        *("adaln", "routers", "output"),
    }


@pytest.mark.parametrize("where", [".", "transformer"])
def test_a_sparse_directory_is_counted_as_it_is(tiny_sparse_dir, where):
    import torch

    from d2m.model.sparse_transformer import SparseFluxTransformer2DModel

    model = SparseFluxTransformer2DModel.from_pretrained(
        tiny_sparse_dir / "transformer", torch_dtype=torch.bfloat16
    )
    for top_k in (None, 0, 4):
        counts = count(shapes_of(model), 2 if top_k is None else top_k)
        answer = plan(tiny_sparse_dir / where, top_k=top_k)
        assert answer["total_params"] == counts["total"]
        assert answer["activated_params"] == counts["activated"]
        assert answer["ffn_activated_share"] == counts["ffn_share"]
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if "neurons" in n)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert answer["memory"]["bf16"] == held


def test_a_sparse_directory_with_groups(tiny_sparse_dir, tmp_path):
    path = tmp_path / "sparse"
    shutil.copytree(tiny_sparse_dir, path)
    (path / "recipe.json").write_text('{"name": "own"}')
    config = json.loads((path / "transformer/config.json").read_text())
    config |= {"groups": {"double": [[0, 1]]}, "kappa": 1, "adaln": "lowrank", "adaln_rank": 4}
    (path / "transformer/config.json").write_text(json.dumps(config))
    answer = plan(path)
    assert answer["recipe"] == "own" and answer["blocks"]["double"]["active"] == 1
    assert answer["adaln"] == {"mode": "lowrank", "rank": 4}


def recipe(tmp_path, **changes):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(json.loads((ANY_DEPTH / "L.json").read_text()) | changes))
    return path


@pytest.mark.parametrize(("rank", "held"), [(64, 64), (None, 6 * 3073 // 343)])
def test_lowrank_modulation(tmp_path, rank, held):
    """A Linear(D, rank) for all and a Linear(rank, 6 D or 3 D) per norm."""
    d, chunks = 3072, 12 * 19 + 3 * 38
    path = recipe(tmp_path, adaln={"mode": "lowrank", "rank": rank})
    row = plan("flux-dev", recipe=path)["components"]["adaln"]
    assert row["params"] == d * held + chunks * d * (held + 1)
    assert row["flops"] == 2 * (d * held + chunks * d * held)


def test_groups_that_keep_all_blocks_ask_no_router(tmp_path):
    path = recipe(tmp_path, blocks={"groups": {"double": [[3, 4, 5]]}, "kappa": 3})
    grouped, plain = plan("flux-dev", recipe=path), plan("flux-dev", recipe=ANY_DEPTH / "L.json")
    assert grouped["flops"] == plain["flops"]
    assert grouped["total_params"] == plain["total_params"] + 9 * 3072


def test_dropped_blocks_are_gone(tmp_path):
    path = recipe(tmp_path, blocks={"drop": {"double": list(range(11))}})
    dropped = plan("flux-dev", recipe=path)
    fewer = plan("flux-dev", recipe=ANY_DEPTH / "L.json", blocks="8D+38S")
    assert dropped["total_params"] == fewer["total_params"]
    assert dropped["flops"] == fewer["flops"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "XXL"}, "preset 'XXL' is not known; expected one of L, M, S, XS for FLUX.1"),
        ({"preset": "S", "blocks": "8D+38S"}, "expected one of L for FLUX.1 with 8 double and 38"),
        ({"preset": "S", "recipe": "r.json"}, "leave one out"),
        ({"recipe": "r.json"}, "recipe r.json is no file"),
        ({"blocks": "8+38"}, "--blocks is '8+38', expected double and single ones as in 8D+38S"),
        ({"blocks": "20D+1S"}, "FLUX.1 [dev] has 19 double blocks"),
        ({"height": 1000}, "--height is 1000, expected a multiple of 16"),
        ({"width": 0}, "--width is 0, expected a multiple of 16"),
        ({"text_tokens": 0}, "--text-tokens is 0"),
        ({"top_k": 2}, "a dense model has no experts"),
        ({"preset": "L", "top_k": 13}, "--top-k is 13, expected 0 to 12"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        plan("flux-dev", **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks": {"groups": {"double": [[17, 18, 19]]}}}, "double block 19; expected 0 to 18"),
        ({"blocks": {"groups": {"single": [[1, 2, 3], [3, 4, 5]]}}}, "single block is [3]"),
        ({"blocks": {"groups": {"double": [[1, 3, 4]]}}}, "consecutive block indices"),
        ({"adaln": {"mode": "none"}}, "adaln.mode is 'none'"),
        ({"adaln": {"mode": "lowrank", "rank": 4000}}, "adaln.rank is 4000; expected 1 to 3072"),
        ({"block": {}}, "unknown key 'block'"),
        ({"expert_ratio": 0.5}, "do not make up the FFN's 12288 neurons"),
    ],
)
def test_bad_recipes(tmp_path, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        plan("flux-dev", recipe=recipe(tmp_path, **changes))


def test_a_sparse_model_takes_no_preset(tiny_sparse_dir):
    with pytest.raises(ValueError, match="is already sparse"):
        plan(tiny_sparse_dir, preset="L")


def test_table_and_conclusion():
    answer = plan("flux-dev", preset="S")
    title, header, rows = table(answer)
    assert title.startswith("FLUX.1 [dev], recipe S, 2 of 12 experts, single AdaLN: 11D + 24S of")
    assert all(len(row) == len(header) for row in rows)
    assert rows[-1] == ["total", "8,733,638,720", "3,163,022,912", "26.6%", "30.47 T", "41.0%"]
    text = conclusion(answer)
    assert "30.47 TFLOP (41.0%), 37.5% of an FFN" in text and "17.48 GB in 16-bit" in text
    assert [figure(n) for n in (812, 4_770_064)] == ["812 ", "4.77 M"]


def test_answers_are_json():
    answer = plan("flux-dev", preset="XS")
    assert json.loads(json.dumps(answer)) == answer
    assert not any(dataclasses.is_dataclass(value) for value in answer.values())


def test_a_plan_needs_no_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers'): sys.modules[name] = None\n"
        "from d2m.cli import main\n"
        "sys.exit(main(['plan', 'flux-dev', '--preset', 'S', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["activated_params"] == 3_163_022_912
