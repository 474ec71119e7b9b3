"""diffusers' own tests of its transformers, run on the sparse classes beside the dense ones.

    python -m scripts.diffusers_suite CHECKOUT [--families flux,sd3] [--tests EXPRESSION]

CHECKOUT is a checkout of diffusers' repository (neither its wheel nor its sdist holds these tests),
best of the installed release. A family's file runs three times in processes of its own: on the
dense class, on the sparse one, and on one with a group of blocks. What passes on the dense class
alone is told; the exit code is 1 where that is anything but EXPECTED: refused in a sentence, for
the reason given there. Nothing is fetched: what needs the hub fails in every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "tests/models/transformers"
# Family -> its file, and the fields of a small model with a group of blocks; None: it has none.
FILES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "flux": ("test_models_transformer_flux.py", {"num_layers": 3}),
    "flux2": ("test_models_transformer_flux2.py", {"num_layers": 3}),
    "chroma": ("test_models_transformer_chroma.py", {"num_layers": 3}),
    "sd3": ("test_models_transformer_sd3.py", {"num_layers": 4}),
    "qwen": ("test_models_transformer_qwenimage.py", {"num_layers": 3}),
    "pixart": ("test_models_pixart_transformer2d.py", None),
    "zimage": ("test_models_transformer_z_image.py", None),
}
GROUPS = {"groups": {"double": [[0, 1]]}, "kappa": 1}
VARIANTS = ("dense", "sparse", "grouped")
# Variant -> what of the dense class's tests it refuses, by a part of their names, and why.
KEPT = "keeps tensors of blocks from step to step, of which other samples run other ones"
EXPECTED = {
    "sparse": {},
    "grouped": dict.fromkeys(("FasterCache", "TaylorSeerCache", "PyramidAttentionBroadcast"), KEPT),
}
ANSWER = "D2M_DIFFUSERS_SUITE"  # variable: what the plugin, this file, is to do and where it writes


def main() -> int:
    """Run, compare, print; 1 where a sparse class fails what the dense one passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of diffusers' repository")
    parser.add_argument("--families", default=",".join(FILES), help="some of %(default)s")
    parser.add_argument("--tests", default="", help="pytest's -k: which of a file's tests")
    parser.add_argument("--json", type=Path, help="file to write")
    given = parser.parse_args()
    names = [name for name in given.families.split(",") if name]
    if unknown := sorted(set(names) - set(FILES)):
        parser.error(f"--families has {', '.join(unknown)}; expected some of {', '.join(FILES)}")
    if not (given.checkout / FOLDER).is_dir():
        parser.error(f"{given.checkout} has no {FOLDER}; give a checkout of diffusers' repository")
    answer = {name: compared(given.checkout.resolve(), name, given.tests) for name in names}
    if given.json:
        from runtime.files.atomic import write_json

        write_json(
            given.json,
            {"command": "python -m scripts.diffusers_suite", **facts(), "families": answer},
        )
    for name, row in answer.items():
        print(f"{name}: dense {counted(row['dense'])}")
        for variant in VARIANTS[1:]:
            if variant not in row:
                continue
            told = row[variant]
            print(f"  {variant} {counted(told['outcomes'])}")
            for kind in ("failed", "refused"):
                for test, reason in told[kind].items():
                    print(f"    {kind} {test.partition('::')[2]}: {reason}")
            for name, row in told["expected"].items():
                print(f"    {row['tests']} tests of {name} are refused, as expected: {row['why']}")
    worse = [row[v][kind] for row in answer.values() for v in VARIANTS[1:] if v in row
             for kind in ("failed", "refused")]  # fmt: skip
    return int(any(worse))


def facts() -> dict[str, str]:
    """The releases that ran."""
    from importlib.metadata import version

    return {name: version(name) for name in ("diffusers", "torch", "peft", "accelerate")}


def counted(outcomes: dict[str, int]) -> str:
    """ "12 passed, 3 failed"."""
    return ", ".join(f"{number} {name}" for name, number in sorted(outcomes.items())) or "no tests"


def compared(checkout: Path, family: str, tests: str) -> dict[str, Any]:
    """Outcomes of the dense class, and what the others do not pass although it does."""
    dense = run(checkout, family, "dense", tests)
    answer: dict[str, Any] = {"dense": outcomes(dense)}
    for variant in VARIANTS[1:]:
        if variant == "grouped" and FILES[family][1] is None:
            continue
        found = run(checkout, family, variant, tests)
        worse = {
            test: row
            for test, row in found.items()
            if row["outcome"] == "failed" and dense.get(test, {}).get("outcome") == "passed"
        }
        wanted = {
            name: [test for test, row in worse.items() if name in test and row["ours"]]
            for name in EXPECTED[variant]
        }
        known = {test for tests_ in wanted.values() for test in tests_}
        answer[variant] = {
            "outcomes": outcomes(found),
            "expected": {
                name: {"tests": len(rows), "why": EXPECTED[variant][name]}
                for name, rows in wanted.items()
                if rows
            },
        } | {
            kind: {
                test: row["reason"]
                for test, row in worse.items()
                if row["ours"] == (kind == "refused") and test not in known
            }
            for kind in ("failed", "refused")
        }
    return answer


def outcomes(rows: dict[str, Any]) -> dict[str, int]:
    """How many passed, failed and were skipped."""
    return dict(Counter(row["outcome"] for row in rows.values()))


def run(checkout: Path, family: str, variant: str, tests: str) -> dict[str, Any]:
    """{test: {"outcome", "reason", "ours": refused by d2m}} of a family's file."""
    file, _ = FILES[family]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "answer.json")
        told = json.dumps({"family": family, "variant": variant, "out": str(out)})
        environment = os.environ | {ANSWER: told, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "scripts.diffusers_suite"]
        command += ["-p", "no:cacheprovider", "--rootdir", str(checkout), "-c", os.devnull]
        command += [*(("-k", tests) if tests else ()), f"{FOLDER}/{file}"]
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True
        )
        if not out.is_file():
            raise SystemExit(f"pytest failed on {file}:\n{(done.stdout + done.stderr)[-2000:]}")
        rows: dict[str, Any] = json.loads(out.read_text())
        return rows


# ---------------------------------------------------------------- in pytest's process

_found: dict[str, dict[str, Any]] = {}


def _told() -> dict[str, Any] | None:
    text = os.environ.get(ANSWER)
    return json.loads(text) if text else None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Let the tests' classes name the sparse class, and fields of a small model of it."""
    told = _told()
    if told is None or told["variant"] == "dense":
        return
    import d2m  # noqa: F401 (diffusers looks the class up here)
    from d2m.families.known import FAMILIES
    from d2m.model.sparse_transformer import sparse_class

    family = next(each for each in FAMILIES if each.names.name == told["family"])
    sparse = sparse_class(family)
    more: dict[str, Any] = {}
    if told["variant"] == "grouped":
        more = {**(FILES[told["family"]][1] or {}), **GROUPS}
    bases = {base for item in items if item.cls for base in item.cls.__mro__}
    for base in bases:
        own = vars(base)
        if (
            isinstance(own.get("model_class"), property)
            and base.__name__ != "BaseModelTesterConfig"
        ):
            base.model_class = property(lambda self: sparse)
        if "get_init_dict" in own and base.__name__ != "BaseModelTesterConfig":
            base.get_init_dict = _with(own["get_init_dict"], more)
        if base.__name__ == "TrainingTesterMixin":
            base.test_gradient_checkpointing_is_applied = _named(
                own["test_gradient_checkpointing_is_applied"], family.names.dense_class, sparse
            )


def _with(made: Any, more: dict[str, Any]) -> Any:
    return lambda self: {**made(self), **more}


def _named(test: Any, dense: str, sparse: type) -> Any:
    """The test expects modules by their classes' names, the model's own among them."""

    def named(self: Any, expected_set: Any = None) -> Any:
        expected = expected_set and {sparse.__name__ if n == dense else n for n in expected_set}
        return test(self, expected_set=expected)

    return named


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        row = {"outcome": report.outcome, "reason": "", "ours": False}
        if crash is not None:
            row["reason"] = " ".join(str(crash.message).split())[:300]
            refusal = crash.message.startswith(("ValueError", "NotImplementedError"))
            row["ours"] = refusal and str(crash.path).startswith(str(ROOT / "d2m"))
        _found[report.nodeid] = row


def pytest_sessionfinish() -> None:
    if (told := _told()) is not None:
        Path(told["out"]).write_text(json.dumps(_found))


if __name__ == "__main__":
    raise SystemExit(main())
