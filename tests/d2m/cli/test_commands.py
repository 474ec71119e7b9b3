"""The command line: answers on stdout, one sentence and exit code 2 for bad input, nothing left."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

import d2m
from d2m.cli import app, main
from d2m.cli.judge import world_of
from d2m.cli.options import knob, numbers

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = (
    *("convert", "lora", "plan", "export", "run", "eval", "parity", "inspect", "doctor", "serve"),
    *("keygen", "sign", "verify", "bench", "measure"),
)


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture
def dense(tiny_dense_dir: Path) -> Path:
    return tiny_dense_dir


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """Run a command that has to fail; returns its sentence."""
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    *_, last = err.splitlines()
    assert last.startswith("error: ")
    assert "Traceback" not in err
    return last


def test_help_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", text, re.M)
        assert main([name, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == {
        *COMMANDS
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "No such command 'nope'"),
        (["convert"], "Missing argument 'DENSE'"),
        (["convert", "x"], "Missing option '-o'"),
        (["convert", "x", "-o", "y", "--bad"], "No such option: --bad"),
        (["convert", "x", "-o", "y", "--steps", "many"], "Invalid value for '--steps'"),
        (["convert", "nothing", "-o", "y", "--init-only"], "nothing"),
        (["convert", "nothing", "-o", "y", "--preset", "XXL"], "preset 'XXL' is not known"),
        (["convert", "nothing", "-o", "y", "--recipe", "r.json"], "recipe r.json"),
        (["convert", "nothing", "-o", "y", "--budget", "2"], "--budget is 2; expected a share of"),
        (["convert", "nothing", "-o", "y", "--init-only", "--steps", "3"], "--init-only"),
        (["convert", "nothing", "-o", "y", "--compare", "s.json"], "s.json is no file"),
        (["convert", "nothing", "-o", "y", "--data", "./none"], "'./none', which is not there"),
        (["convert", "nothing", "-o", "y", "--skip", "-1", "--data", "none.tar"], "none.tar"),
        (["lora", "none.safetensors", "--onto", "nothing"], "nothing is no directory"),
        (["plan", "nothing"], "'nothing' is no directory"),
        (["plan", "flux-dev", "--preset", "XXL"], "preset 'XXL' is not known"),
        (["plan", "flux-dev", "--height", "1000"], "--height is 1000"),
        (["plan", "flux-dev", "--recipe", "r.json"], "recipe r.json"),
        (["export", "nothing", "-o", "y"], "nothing"),
        (
            ["export", "nothing", "-o", "y", "--sm", "high"],
            "'--sm': 'high', expected whole numbers",
        ),
        (["export", "nothing", "-o", "y", "--top-k", "1;2"], "'--top-k': '1;2'"),
        (["export", "nothing", "-o", "y", "--dtype", "fp8"], "fp8"),
        (["run", "--bundle", "nothing", "a circle"], "nothing"),
        (["run", "nothing", "a circle"], "nothing"),
        (["run", "a", "b", "--bundle", "c"], "two bundles are given"),
        (["run", "a", "-o", "picture.gif"], "picture.gif"),
        (["run", "a", "--seed", "x"], "Invalid value for '--seed'"),
        (["eval", "nothing"], "nothing"),
        (["eval", "nothing", "--suite", "geneval"], "'geneval'"),
        (["eval", "nothing", "-n", "0"], "0"),
        (["eval", "nothing", "--world", "colours=many"], "colours=many"),
        (["eval", "nothing", "--world", "hues=3"], "hues=3"),
        (["eval", "nothing", "--world", "colours=99"], "99"),
        (["parity", "nothing", "neither"], "neither"),
        (["inspect", "nothing"], "nothing"),
        (["bench", "nothing"], "nothing"),
        (["bench", "--vs", "nothing"], "nothing"),
        (["bench", "--runs", "0"], "--runs is 0"),
        (["bench", "--batch", "1,0"], "--batch is 1,0"),
        (["bench", "--batch", ""], "--batch is "),
        (["bench", "--top-k", "3"], "top_k is 3"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments)
    assert files(tmp_path) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["inspect", str(tmp_path / "nothing"), "--debug"])


def test_a_fault_of_ours_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import runtime.inspect.directory

    monkeypatch.setattr(runtime.inspect.directory, "inspect", lambda path: {}["x"])
    assert "unexpected KeyError: 'x'" in refused(capsys, "inspect", "x", code=1)


def test_inspect_a_pipeline(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dense)]) == 0
    assert capsys.readouterr().out.startswith("dense pipeline ")
    assert main(["inspect", str(dense), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["blocks"] == {"double": 2, "single": 2}


def test_plan_says_it_in_a_table_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "flux-dev", "--preset", "S"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^total +8,733,638,720 +3,163,022,912 +26.6% +30.47 T +41.0%$", text, re.M)
    assert re.search(r"^A step uses 3,163,022,912 of 8,733,638,720", text, re.M)
    assert re.search(r"^convert --init-only +2.4 GB +27.4 GB +\d+:", text, re.M)
    assert main(["plan", "flux-dev", "--blocks", "5D+10S", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["total_params"] == 3_179_199_552


# ---------------------------------------------------------------- every command on tiny models


def answer_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that has to succeed; returns its stdout."""
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_run_writes_a_picture(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "a.png"
    text = answer_of(capsys, "run", tiny_bundle, "a red circle", "-o", out, "--steps", 2)
    assert text.startswith(f"{out} (ort, ")
    assert Image.open(out).size == (16, 16)
    text = answer_of(
        *(capsys, "run", "--bundle", tiny_bundle, "a red circle", "-n", 2, "-o", out),
        *("--seed", 5, "--steps", 2, "--top-k", 1, "--json"),
    )
    answer = json.loads(text)
    assert answer["files"] == [str(tmp_path / "new/a-0.png"), str(tmp_path / "new/a-1.png")]
    assert answer["backend"] == "ort"
    assert files(tmp_path / "new") == ["a-0.png", "a-1.png", "a.png"]


def test_run_same_seed_same_bytes(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        answer_of(capsys, "run", tiny_bundle, "two rings", "-o", tmp_path / name, "--steps", 2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", 0], "steps is 0"),
        (["--height", 17], "height is 17"),
        (["--top-k", 3], "top_k is 3"),
        (["--seed", -1], "seed is -1"),
        (["-n", 0], "n is 0"),
        (["--guidance", -2], "guidance is -2"),
        (["--backend", "cuda"], "'cuda'"),
    ],
)
def test_run_refuses_bad_values(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    words: str,
) -> None:
    out = tmp_path / "x.png"
    assert words in refused(capsys, "run", tiny_bundle, "a ring", "-o", out, *arguments)
    assert files(tmp_path) == []


def test_run_wants_a_prompt_after_a_bundle(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no prompt follows" in refused(capsys, "run", tiny_bundle)


EVAL = ("-n", 6, "--steps", 1, "--world", "size=32", "--batch", 4)


def test_eval_of_a_bundle_and_of_pipelines(
    tiny_bundle: Path, tiny_sparse_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tiny_bundle, tiny_sparse_dir):
        target, grid = tmp_path / f"{path.name}.json", tmp_path / f"{path.name}.png"
        text = answer_of(capsys, "eval", path, *EVAL, "--out", target, "--grid", grid)
        assert "colour attribution" in text
        answer = json.loads(target.read_text())
        assert (answer["suite"], answer["n"], answer["seed"]) == ("shapes", 6, 0)
        rates = [answer["overall"], *answer["categories"].values()]
        assert all(set(rate) == {"score", "low", "high", "n"} for rate in rates)
        assert len(answer["categories"]) == 6
        assert Image.open(grid).width > 100
    printed = answer_of(capsys, "eval", tiny_bundle, *EVAL, "--json", "--top-k", 0)
    assert json.loads(printed)["overall"]["n"] == 6


def test_eval_of_two_starts_from_the_same_noise(
    tiny_bundle: Path,
    tiny_sparse_dir: Path,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The pipeline that a bundle was made of gives its images; a dense one gives its own."""
    from calib.score import pairs

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "paired", lambda one, two: seen.append((one, two)) or {"both": 0})
        grid = tmp_path / "grid.png"
        arguments = ("eval", tiny_sparse_dir, "--vs", tiny_bundle, *EVAL, "--grid", grid, "--json")
        answer = json.loads(answer_of(capsys, *arguments))
    assert answer["pairs"] == {"both": 0} and answer["vs"]["n"] == answer["n"] == 6
    for one, two in zip(*seen[0], strict=True):
        assert one.scene == two.scene
        difference = one.image.astype(int) - two.image.astype(int)
        assert abs(difference).max() <= 1 and one.image.std() > 5
    assert Image.open(grid).width > 700
    text = answer_of(capsys, "eval", dense, "--vs", tiny_bundle, *EVAL, "--top-k", 0)
    assert "of 6 captions both show" in text and text.count("overall") == 2


def test_eval_refuses_experts_of_a_dense_model(
    dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "the model has no experts" in refused(capsys, "eval", dense, *EVAL, "--top-k", 2)


def test_inspect_a_sparse_checkpoint_and_a_bundle(
    tiny_bundle: Path, tiny_sparse_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, what in ((tiny_sparse_dir, "sparse checkpoint"), (tiny_bundle, "sparse bundle")):
        assert answer_of(capsys, "inspect", path).startswith(what)
        answer = json.loads(answer_of(capsys, "inspect", path, "--json"))
        assert answer["experts"]["num_experts"] == 12
        counts = answer["parameters"]["transformer"]
        assert 0 < counts["activated"] < counts["total"]


def test_knobs_by_step(
    tiny_grouped_bundle: Path,
    tiny_grouped_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--kappa and --top-k, one number or one a step, in the runtime and in eager."""
    made = []
    for name, kappa in (("a", "1,3"), ("b", "1,3"), ("c", "3,1"), ("d", "2")):
        out = tmp_path / f"{name}.png"
        knobs = ("--steps", 2, "--kappa", kappa, "--top-k", "2,1")
        answer_of(capsys, "run", tiny_grouped_bundle, "two rings", "-o", out, *knobs)
        made.append(out.read_bytes())
    assert made[0] == made[1] and len(set(made)) == 3
    few = ("-n", 2, "--steps", 2, "--world", "size=32", "--batch", 2, "--json")
    for path in (tiny_grouped_bundle, tiny_grouped_dir):
        answer = json.loads(answer_of(capsys, "eval", path, *few, "--kappa", "2,1", "--top-k", "1"))
        assert answer["n"] == 2
        words = refused(capsys, "eval", path, *few, "--kappa", "1,1,1")
        assert "3 numbers for 2" in words
        assert "kappa" in refused(capsys, "eval", path, *few, "--kappa", "4")
    assert "'--kappa': 'x'" in refused(capsys, "run", tiny_grouped_bundle, "a", "--kappa", "x")
    assert "'--top-k': ',', expected a number" in refused(
        capsys, "run", tiny_grouped_bundle, "a", "--top-k", ","
    )


def test_inspect_shows_groups_and_the_schedule(
    tiny_grouped_bundle: Path,
    tiny_grouped_dir: Path,
    tiny_forecast_bundle: Path,
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (tiny_grouped_dir, tiny_grouped_bundle):
        text = answer_of(capsys, "inspect", path)
        assert "groups: 2, each keeps kappa = 1, 4 blocks are skipped" in text
        assert "  transformer_blocks 1-3, alpha 0.5" in text
        answer = json.loads(answer_of(capsys, "inspect", path, "--json"))
        assert answer["kappa"] == 1 and answer["groups"][1] == {
            "name": "single_transformer_blocks.0",
            "list": "single_transformer_blocks",
            "blocks": [0, 1, 2],
            "alpha": 0.5,
        }
        counts = answer["parameters"]["transformer"]
        assert counts["activated"] < counts["total"]
    asked = ("inspect", tiny_forecast_bundle, "--schedule", "a red circle", "--steps", 3)
    answer = json.loads(answer_of(capsys, *asked, "--kappa", "1,2,3", "--json"))
    assert answer["steps"] == 3 and answer["kappa"] == [1, 2, 3] and answer["sigmas"][0] == 1
    for group in answer["groups"]:
        assert [len(blocks) for blocks in group["runs"]] == [1, 2, 3]
        assert all(set(blocks) <= set(group["blocks"]) for blocks in group["runs"])
    text = answer_of(capsys, *asked)
    assert "double 1-3" in text and "single 0-2" in text and "1.000" in text
    for path, words in (
        (tiny_grouped_bundle, "has alpha 0.5 and so reads the image while it is generated"),
        (tiny_bundle, "has no groups of blocks"),
    ):
        assert words in refused(capsys, "inspect", path, "--schedule", "a")


@pytest.fixture(scope="module")
def shapes_dense(tiny_dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model drawing at 32 pixels, so that it has training data."""
    path = tmp_path_factory.mktemp("shapes") / "dense"
    shutil.copytree(tiny_dense_dir, path)
    config = json.loads((path / "vae/config.json").read_text())
    (path / "vae/config.json").write_text(json.dumps({**config, "sample_size": 32}))
    (path / "defaults.json").write_text('{"num_inference_steps": 2}')
    return path


def test_convert_export_and_parity(
    shapes_dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way on a tiny model: only that the commands fit together."""
    recipe = json.loads((ROOT / "d2m/recipe/presets/L.json").read_text())
    recipe |= {"name": "tiny", "calibration": {"batches": 1, "batch_size": 4}}
    for stage in recipe["stages"]:
        stage["batch_size"] = 4
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    sparse, bundle = tmp_path / "sparse", tmp_path / "bundle"
    convert = ["convert", shapes_dense, "-o", sparse, "--recipe", tmp_path / "r.json"]
    convert += ["--steps", 4, "--score", 6, "--json"]
    rate = {"score": 0.5, "low": 0.2, "high": 0.8, "n": 6}
    other = {"name": "other", "kind": "pruned", "of": None, "score": rate}
    other |= {"flops_vs_dense": 0.5, "activated_params": 9}
    (tmp_path / "summary.json").write_text(json.dumps({"rows": [other]}))
    convert += ["--compare", tmp_path / "summary.json"]
    answer = json.loads(answer_of(capsys, *convert))
    assert (answer["steps"], answer["recipe"]) == (4, "tiny")
    for name in ("model_index.json", "recipe.json", "report.html", "README.md", "defaults.json"):
        assert (sparse / name).is_file(), name
    report = json.loads((sparse / "report.json").read_text())
    assert [row["name"] for row in report["pareto"]] == ["dense", "sparse", "other"]
    assert set(report["routing"]["positions"]["layers"]) < set(report["routing"]["layers"])
    assert "exists" in refused(capsys, *convert)  # never written over
    answer_of(capsys, *convert, "--resume")

    answer_of(capsys, "export", sparse, "-o", bundle, "--top-k", "2")
    assert main(["parity", str(sparse), str(bundle), "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == "ort" and found["components"] and found["blocks"]
    assert files(tmp_path)[0] == "bundle" and not list(tmp_path.glob(".*"))


def test_convert_for_a_budget(
    shapes_dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chosen recipe is the directory's, and plan counts no more than was asked for."""
    recipe = json.loads((ROOT / "d2m/recipe/presets/L.json").read_text())
    recipe |= {"name": "tiny", "calibration": {"batches": 1, "batch_size": 4}}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    arguments = ["convert", shapes_dense, "-o", tmp_path / "out", "--recipe", tmp_path / "r.json"]
    arguments += ["--init-only", "--score", 0, "--no-report"]
    assert "expected 0." in refused(capsys, *arguments, "--budget", 0.05)
    assert main([str(each) for each in [*arguments, "--budget", 0.5, "--json"]]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert "budget 0.5 of dense FLOPs: the chosen recipe needs 0.4" in " ".join(err.split())
    assert answer["recipe"] == "tiny-budget-0.5"
    counted = json.loads(answer_of(capsys, "plan", tmp_path / "out", "--json"))
    assert counted["flops_vs_dense"] == pytest.approx(answer["budget"]["flops_vs_dense"])
    assert answer["budget"]["smallest"] <= counted["flops_vs_dense"] <= 0.5
    written = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert written["blocks"]["groups"] == answer["budget"]["groups"]
    assert written.get("shares", {}) == answer["budget"]["shares"]


def blocked(modules: list[str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run d2m in a process where `modules` cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({modules}))\n"
        "from d2m.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
    )


TORCH = ["torch", "diffusers", "transformers", "accelerate"]
ONNX = ["onnx", "onnxscript", "onnx_ir", "polygraphy"]


@pytest.mark.parametrize(
    ("modules", "arguments", "extra"),
    [
        (TORCH + ONNX, ["convert", "DENSE", "-o", "out"], "convert"),
        (TORCH + ONNX, ["eval", "DENSE", "-n", "6"], "convert"),
        (ONNX, ["export", "DENSE", "-o", "out"], "export"),
    ],
)
def test_a_missing_extra_is_named(
    modules: list[str], arguments: list[str], extra: str, dense: Path, tmp_path: Path
) -> None:
    arguments = [str(dense) if word == "DENSE" else word for word in arguments]
    answer = blocked(modules, *arguments, cwd=tmp_path)
    assert answer.returncode == 2, answer.stderr
    assert answer.stdout == ""
    assert re.search(rf"; install with: pip install .*\[{extra}\]'$", answer.stderr)
    assert "Traceback" not in answer.stderr
    assert files(tmp_path) == []


def test_the_base_install_inspects_and_helps(dense: Path, tmp_path: Path) -> None:
    heavy = TORCH + ONNX + ["tensorrt", "tensorrt_rtx", "cuda"]
    for arguments in (["--help"], ["run", "--help"], ["inspect", str(dense)]):
        answer = blocked(heavy, *arguments, cwd=tmp_path)
        assert answer.returncode == 0, answer.stderr


def test_help_answers_within_a_second(tmp_path: Path) -> None:
    def taken() -> float:
        """Seconds of a processor: what runs beside the tests lengthens only the clock's time."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = taken()
    assert blocked([], "--help", cwd=tmp_path).returncode == 0
    assert 0.05 < taken() - before < 2  # .4 s on an idle core


def test_ctrl_c_is_a_sentence_and_130(tmp_path: Path) -> None:
    code = (
        "import sys, time, runtime.inspect.directory\n"
        "def slow(path):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "runtime.inspect.directory.inspect = slow\n"
        "from d2m.cli import main; sys.exit(main(['inspect', 'x']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "interrupted"
    assert "Traceback" not in err


@pytest.mark.parametrize(("text", "values"), [("", ()), ("0,1, 2", (0, 1, 2)), ("89", (89,))])
def test_numbers(text: str, values: tuple[int, ...]) -> None:
    assert numbers(text) == values


def test_a_knob_is_a_number_or_one_a_step() -> None:
    assert knob("2") == 2 and knob("2,2,1") == [2, 2, 1]


def test_a_world() -> None:
    assert world_of("") == {} and world_of("size=64, shapes=6") == {"size": 64, "shapes": 6}


@pytest.mark.parametrize("text", ["hues=1", "size", "size=", "size=x", "size=-1", ","])
def test_no_world(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected NAME=NUMBER with a name of size, "):
        world_of(text)


def test_help_version_and_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-h"]) == 0
    assert capsys.readouterr().out.startswith("Usage: d2m run ")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"d2m {d2m.__version__}\n"
    command = [sys.executable, "-m", "d2m", "inspect", "nothing"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: nothing ")


def test_a_shell_completes_commands() -> None:
    environment = {**os.environ, "_D2M_COMPLETE": "complete_bash", "COMP_WORDS": "d2m ins"}
    command = [sys.executable, "-m", "d2m"]
    environment |= {"COMP_CWORD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["inspect"]


def test_presets_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [answer_of(capsys, "plan", "flux-dev", "--preset", name) for name in ("XS", "xs")]
    assert figures[0].splitlines()[:8] == figures[1].splitlines()[:8]


@pytest.mark.parametrize("closed", [1, 2])
def test_closed_streams_are_no_fault(closed: int) -> None:
    """`d2m inspect DIR >&-`, and the same of standard error."""
    code = f"import os, sys; os.close({closed}); os.execv(sys.executable, sys.argv[1:])"
    row = [sys.executable, "-m", "d2m", "inspect", str(ROOT / "runtime/default")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *row], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sparse bundle ") == (closed == 2)


def test_run_says_seeds_and_settings_in_json(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("run", tiny_bundle, "a ring", "-n", 2, "--seed", 5, "--steps", 2, "--json")
    answer = json.loads(answer_of(capsys, *arguments, "-o", tmp_path / "a.png"))
    assert answer["seeds"] == [row["seed"] for row in answer["settings"]]
    assert answer["seeds"][0] == 5 and len(set(answer["seeds"])) == 2
    assert {row["steps"] for row in answer["settings"]} == {2}
    assert {row["prompt"] for row in answer["settings"]} == {"a ring"}


def test_export_writes_over_a_bundle_only_when_told(
    tiny_bundle: Path, tiny_sparse_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, out)
    before = files(out)
    said = refused(capsys, "export", tiny_sparse_dir, "-o", out)
    assert "is a bundle already; give another name, or add --force" in said
    assert files(out) == before
    answer_of(capsys, "export", tiny_sparse_dir, "-o", out, "--force", "--top-k", "1,2")
    assert json.loads((out / "manifest.json").read_text())


def test_a_prompt_in_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    assert "one pair of quotes" in refused(capsys, "run", "a red", "circle")


def test_a_sparse_pipeline_is_not_converted_again(
    tiny_sparse_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = ("--init-only", "--importance", "magnitude")
    said = refused(capsys, "convert", tiny_sparse_dir, "-o", tmp_path / "out", *exact)
    assert said.endswith(f": compile it with: d2m export {tiny_sparse_dir} -o NEW")
