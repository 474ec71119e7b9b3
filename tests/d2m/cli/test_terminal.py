"""Progress lines, sentences for errors, and the printing of answers."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest

from d2m.cli import progress as shown
from d2m.cli.terminal import explain, one_line, print_json, print_table, print_tree
from d2m.distill.stopping import Terminated, terminated_on_signal
from d2m.units import clock
from runtime.files.atomic import temporary_dir
from runtime.files.extras import EXTRAS, command


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (75, "1:15"), (3600, "1:00:00")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_lines_say_phase_elapsed_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 1.0, 12.0, 13.0, 20.0, 20.5, 20.6, 30.0, 31.5])
    progress = shown._Lines(lambda: next(times))
    for done in (0, 1, 12, 13, 20):
        progress("shared", done, 20)
    progress("short", 0, 5)
    progress("short", 5, 5)
    progress("shared", 0, 3)  # begins again
    progress("shared", 3, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "shared: 0/20",
        "shared: 12/20, 0:12, 0:08 left",
        "shared: 20/20, 0:20",
        "short: 0/5",
        "shared: 0/3",
        "shared: 3/3, 0:02",
    ]


def test_a_silent_phase_has_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 5.0, 12.0, 13.0, 24.0, 25.0, 61.0, 80.0, 81.0])
    lines = shown._Lines(lambda: next(times))
    lines("plans (x)", 0, 20)
    lines.tick()  # at 5 s: it has just spoken
    lines.tick()  # 12 s
    lines("plans (x)", 1, 20)
    lines.tick()  # 24 s
    lines.tick()
    lines("plans (x)", 20, 20)
    lines.tick()  # over: nothing to say
    assert capsys.readouterr().err.splitlines() == [
        "plans (x): 0/20",
        "plans (x): 0/20, 0:12",
        "plans (x): 1/20, 0:24, 7:36 left",
        "plans (x): 20/20, 1:01",
    ]


def test_bars_take_new_phases_and_totals() -> None:
    with shown._bars() as progress:
        progress("a", 0, 0)
        progress("a", 1, 3)
        progress("a", 0, 2)
        progress("b", 2, 2)


class Usage(Exception):
    def format_message(self) -> str:
        return "No such option: --bad"


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (ValueError("top_k is 13,\n  expected 0 to 12."), "top_k is 13, expected 0 to 12", 2),
        (KeyboardInterrupt(), "interrupted", 130),
        (KeyboardInterrupt("stopped at step 3"), "stopped at step 3", 130),
        (Usage(), "No such option: --bad; see d2m COMMAND --help", 2),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
            "cannot use 'x': no such file or directory; check the path and its rights",
            2,
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            "cannot write 'x': no space left on device; free some space and run again",
            2,
        ),
        (
            OSError(errno.ENOSPC, "the disk of x is full, free some."),
            "the disk of x is full, free some",
            2,
        ),
        (FileNotFoundError("'x' has no manifest.json"), "'x' has no manifest.json", 2),
        (
            ImportError("exporting needs onnx; install with: pip install -e '.[export]'"),
            "exporting needs onnx; install with: pip install -e '.[export]'",
            2,
        ),
    ],
)
def test_explain(error: BaseException, sentence: str, code: int) -> None:
    assert explain(error) == (sentence, code)


def test_only_a_conversion_is_told_to_resume() -> None:
    for error, begin in (
        (KeyboardInterrupt(), "interrupted"),
        (Terminated(), "stopped by SIGTERM"),
    ):
        assert explain(error)[0] == begin
        assert explain(error, resumes=True)[0] == f"{begin}; continue with --resume"
    said = KeyboardInterrupt("stopped after 3 of 9 steps, continue with --resume")
    assert explain(said, resumes=True) == (str(said), 130)
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    assert explain(full, resumes=True)[0].endswith("free some space and continue with --resume")


def test_sigterm_clears_away_and_is_143(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as caught, terminated_on_signal(), temporary_dir(tmp_path / "x"):
        assert len(list(tmp_path.iterdir())) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) == before
    sentence, code = explain(caught.value)
    assert code == 143 and sentence == "stopped by SIGTERM"


@pytest.mark.parametrize(("module", "extra"), sorted(EXTRAS.items()))
def test_a_missing_module_names_its_extra(module: str, extra: str) -> None:
    error = ModuleNotFoundError(f"No module named '{module}.nn'", name=f"{module}.nn")
    sentence, code = explain(error)
    assert code == 2
    assert f"needs the Python package {module}" in sentence
    assert sentence.endswith(f"install with: {command(extra)}")


def test_a_fault_of_ours_is_code_1() -> None:
    sentence, code = explain(KeyError("x"))
    assert code == 1
    assert sentence.startswith("unexpected KeyError: 'x'")
    assert "--debug" in sentence


def test_one_line() -> None:
    assert one_line(" a\n  b. ") == "a b"


def test_json_goes_to_stdout_sorted(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"b": 1, "a": [1.5, None]})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": [1.5, None], "b": 1}
    assert out.index('"a"') < out.index('"b"')


def test_tree_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_tree(
        {
            "kind": "sparse",
            "parameters": {"total": 1234567, "guided": True},
            "blocks": [{"name": "double", "k": 2}],
            "choices": [0, 1, 2],
            "plans": [],
        }
    )
    print_table("score", ["category", "score"], [["counting", "0.500"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "kind: sparse",
        "parameters",
        "  total: 1,234,567",
        "  guided: yes",
        "blocks",
        "  name double, k 2",
        "choices: 0, 1, 2",
        "plans: none",
        "score",
        "category  score",
        "counting  0.500",
    ]
