"""Fuzz what reads foreign bytes in the runtime: python -m scripts.fuzz --executions 1000000

Every target takes bytes, and must either accept them or raise ValueError with one printable
sentence, in bounded time and memory. Engines: atheris (coverage-guided, where it is installed: it
has wheels for Linux), or a mutation loop of ours over the same seeds that needs nothing. Targets
run one after the other, each in a process of its own; RESULT.json is written after every one, and
a run that was killed goes on with the targets that are missing. What broke something is kept in
tests/corpus/TARGET/, which tests/runtime/bundle/test_corpus.py runs through the same targets.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests/corpus"

# target -> share of the executions
SHARES = {"onnx": 0.4, "header": 0.35, "manifest": 0.12, "kernels": 0.1, "tokenizer": 0.025,
          "library": 0.005}  # fmt: skip
SECONDS = 2.0  # of the process's own time, for one execution
MEMORY = 2 << 30  # bytes of address space beyond what the process had at first
MAX_LEN = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--engine", choices=["auto", "atheris", "own"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results/fuzz.json")
    parser.add_argument("--target", choices=SHARES, help="one target, in this process")
    arguments = parser.parse_args()
    engine = arguments.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "own"
    if arguments.target:
        work = arguments.out.with_suffix(f".{arguments.target}.json")
        fuzz(arguments.target, engine, arguments.executions, arguments.seed, work)
        return 0
    from runtime.files.atomic import write_json

    rows: dict[str, Any] = {}
    if arguments.out.is_file():
        rows = json.loads(arguments.out.read_text())["targets"]
    for target, share in SHARES.items():
        if target in rows:
            continue
        count = round(arguments.executions * share)
        work = arguments.out.with_suffix(f".{target}.json")
        command = [sys.executable, "-m", "scripts.fuzz", "--target", target, "--engine", engine]
        command += ["--executions", str(count), "--seed", str(arguments.seed)]
        command += ["--out", str(arguments.out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        row = json.loads(work.read_text()) if work.is_file() else {"executions": 0}
        work.unlink(missing_ok=True)
        shutil.rmtree(work.with_suffix(".corpus"), ignore_errors=True)  # atheris's own
        row["exit_code"] = done.returncode
        if done.returncode:
            row["last_words"] = done.stderr[-600:]
        rows[target] = row
        write_json(arguments.out, summary(rows, arguments.seed))
        print(f"{target}: {row}", flush=True)
    bad = sum(row["exit_code"] != 0 or len(row.get("failures", ())) for row in rows.values())
    return 1 if bad else 0


def summary(rows: dict[str, Any], seed: int) -> dict[str, Any]:
    """What is recorded."""
    return {
        "what": "python -m scripts.fuzz",
        "executions": sum(row["executions"] for row in rows.values()),
        "failures": sum(len(row.get("failures", ())) for row in rows.values()),
        "seed": seed,
        "seconds_allowed": SECONDS,
        "bytes_allowed": MEMORY,
        "python": platform.python_version(),
        "targets": rows,
    }


def fuzz(target: str, engine: str, count: int, seed: int, out: Path) -> None:
    """Run one target `count` times and write what happened to `out`."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["runtime"]):
            from scripts.fuzz import targets
    else:
        from scripts.fuzz import targets
    run, seeds = targets.TARGETS[target], targets.seeds(target)
    known = sorted((CORPUS / target).glob("*")) if (CORPUS / target).is_dir() else []
    seeds += [path.read_bytes() for path in known]
    with contextlib.suppress(ValueError):
        run(seeds[0])  # imports whatever it needs before memory is bounded
    counted = CountedTarget(target, run, count, engine, seed, out)
    bound_memory()
    if engine == "own":
        for data in seeds:
            counted(data)
        draw = random.Random(seed)
        while counted.row["executions"] < count:
            counted(mutated(draw, seeds))
        return
    folder = out.with_suffix(".corpus")
    folder.mkdir(parents=True, exist_ok=True)
    for data in seeds:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    words = [sys.argv[0], f"-runs={count}", f"-seed={seed + 1}", f"-max_len={MAX_LEN}"]
    words += ["-timeout=60", "-rss_limit_mb=0", "-verbosity=0", "-print_final_stats=0"]
    atheris.Setup([*words, str(folder)], counted)
    atheris.Fuzz()


class CountedTarget:
    """A target that counts what it is given, and keeps what breaks it."""

    def __init__(self, target: str, run: Callable[[bytes], None], count: int, engine: str,
                 seed: int, out: Path) -> None:  # fmt: skip
        self.target, self.run, self.count, self.out = target, run, count, out
        self.row: dict[str, Any] = {"engine": engine, "seed": seed, "failures": []}
        self.row |= {"executions": 0, "accepted": 0, "refused": 0, "slowest_seconds": 0.0}
        self.began, self.own = time.monotonic(), time.process_time()

    def __call__(self, data: bytes) -> None:
        row, began = self.row, time.process_time()
        try:
            self.run(data)
            row["accepted"] += 1
        except ValueError as error:
            row["refused"] += 1
            if not str(error).isprintable() or len(str(error)) > 900 or not str(error):
                self.keep(data, f"no printable sentence: {str(error)[:80]!r}")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.keep(data, f"{type(error).__name__}: {str(error)[:80]}")
        took = time.process_time() - began
        row["slowest_seconds"] = max(row["slowest_seconds"], round(took, 4))
        if took > SECONDS:
            self.keep(data, f"it took {took:.1f} s")
        row["executions"] += 1
        if row["executions"] % 5000 == 0 or row["executions"] >= self.count:
            row["seconds"] = round(time.monotonic() - self.began, 1)
            row["cpu_seconds"] = round(time.process_time() - self.own, 1)
            row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            from runtime.files.atomic import write_json  # late: atheris instruments imports

            write_json(self.out, row)

    def keep(self, data: bytes, what: str) -> None:
        """Put an input into the corpus of regressions."""
        folder = CORPUS / self.target
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(data).hexdigest()[:16]
        (folder / name).write_bytes(data)
        if len(self.row["failures"]) < 20:
            self.row["failures"].append({"input": name, "what": what})
            print(f"{self.target}/{name}: {what}", file=sys.stderr, flush=True)


def bound_memory() -> None:
    """MemoryError before the machine has no memory left."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def mutated(draw: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with some bytes changed, dropped, repeated, or joined with those of another."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(7)
        if kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del data[at : at + draw.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 5)))
        elif kind == 3 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 4:
            start = draw.randrange(len(data) + 1)
            data[at:at] = data[start : start + draw.randrange(1, 65)]
        elif kind == 5:
            words = (b"\xff" * 9 + b"\x01", b"-1", b"1e999", b"null", b"[]", b"{}", b"\\ud800",
                     b"9" * 40, b"../x", b"\0", b'"', b"true")  # fmt: skip
            data[at:at] = draw.choice(words)
        else:
            other = draw.choice(seeds)
            data[at:] = other[draw.randrange(len(other) + 1) :]
    return bytes(data[:MAX_LEN])


if __name__ == "__main__":
    sys.exit(main())
