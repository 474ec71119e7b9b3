"""Foreign bundles: ONNX Runtime runs their graphs first in a process of its own, with limits.

A graph may pass every check of its bytes and still end the process that runs it (the smallest
integer divided by -1, also while constants are folded), fill its memory or multiply for ever. So a
bundle that was neither exported on this machine nor signed by the required key is tried once:
`python -m runtime.trial` opens all of its graphs and generates small images with them. What passed
is remembered by the bundle's digest, that is by the hash of every file.

A trial shows what graphs do on its own inputs. It is no sandbox: it guards against what stops a
process, and the checks of runtime.bundle.onnx_file against what reads or writes files.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.bundle.reading import broken
from runtime.files.checked_json import printable
from runtime.files.hashes import cache_dir, read_cached, sha256, write_cached

if TYPE_CHECKING:
    from runtime.bundle.directory import Bundle

log = logging.getLogger("runtime")
PACKAGE = Path(__file__).resolve().parents[1]
SETTING = "D2M_TRIAL"
SETTINGS = ("foreign", "never")
# What a trial may use: so much, and more by the bytes of the bundle's files. A model's weights are
# read, widened from 16 bits, packed, and multiplied by some hundred tokens a few times over.
SECONDS, SECONDS_PER_GIB = 60, 90  # of processor time
WAITING = 10  # times as long by the clock, on a busy machine
MEMORY, MEMORY_PER_BYTE = 4 << 30, 5


def try_foreign(
    bundle: Bundle, backend: str, threads: int | None, options: Mapping[str, Any]
) -> None:
    """Try a bundle's graphs where nobody vouches for them; ValueError where they do not pass.

    `options` are those of ONNX Runtime's executors: where blocks are streamed a trial streams them.
    """
    if setting() == "never" or vouched_for(bundle):
        return
    import onnxruntime

    offload = "block" if options.get("offload") == "block" else None
    way = " ".join([backend, offload or "whole", onnxruntime.__version__])
    seen = read_verdicts(bundle.digest)
    if way not in passed(seen):
        log.warning("%s was made elsewhere: its graphs are tried in a process first", bundle.path)
        run_trial(bundle, {"backend": backend, "threads": threads, "offload": offload})
        write_verdicts(bundle.digest, {**seen, "passed": [*passed(seen), way]})
    bundle.trusted = "tried"


def vouched_for(bundle: Bundle) -> str | None:
    """Who vouches for a bundle's graphs without a trial (or since one), None: nobody."""
    if bundle.trusted is None:
        if bundle.digest == sha256(PACKAGE / "default" / "manifest.json"):  # or a copy of it
            bundle.trusted = "part of d2m"
        elif read_verdicts(bundle.digest).get("made here") is True:
            bundle.trusted = "made here"
    return bundle.trusted


def setting() -> str:
    """$D2M_TRIAL: "foreign" (as without it) or "never"."""
    value = os.environ.get(SETTING) or SETTINGS[0]
    if value not in SETTINGS:
        raise ValueError(f"{SETTING} is {value!r}, expected one of {', '.join(SETTINGS)}.")
    return value


def made_here(digest: str) -> None:
    """Remember that the bundle of this digest was exported on this machine, by this user."""
    write_verdicts(digest, {"made here": True})


def passed(seen: Mapping[str, Any]) -> list[str]:
    """The ways of opening that passed a trial."""
    ways = seen.get("passed")
    return [way for way in ways if isinstance(way, str)][:64] if isinstance(ways, list) else []


def verdicts_file(digest: str) -> Path | None:
    """Where it is remembered what is known of a bundle, beside the hashes of files."""
    base = cache_dir()
    return base / "trials" / f"{digest}.json" if base else None


def read_verdicts(digest: str) -> dict[str, Any]:
    """What is remembered of a bundle: "made here", "passed"."""
    return read_cached(verdicts_file(digest), "what is remembered of trials cannot be read")


def write_verdicts(digest: str, value: Mapping[str, Any]) -> None:
    """Write what `read_verdicts` shall give; where that cannot be written, the log says so."""
    place = verdicts_file(digest)
    try:
        if place is not None:
            write_cached(place, json.dumps(value))
    except OSError as error:
        log.info("the trial of a bundle is not remembered (%s)", error)


def run_trial(bundle: Bundle, options: Mapping[str, Any]) -> None:
    """The process, within its limits; ValueError, ImportError or OSError where it does not pass."""
    size = sum(row["size"] for row in bundle.manifest["files"].values())
    seconds = SECONDS + SECONDS_PER_GIB * size // (1 << 30)
    memory = MEMORY + MEMORY_PER_BYTE * size
    job = {
        "bundle": str(bundle.path.resolve()),
        "digest": bundle.digest,
        "seconds": seconds,
        "memory": None if options["backend"] == "ort-cuda" else memory,  # CUDA reserves addresses
        **options,
    }
    command = [python(), "-P", "-m", "runtime.trial", json.dumps(job)]
    # The interpreter may not see this package otherwise (a checkout, a zip beside it).
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), SETTING: "never"}
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=WAITING * seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise slow(bundle, f"{WAITING * seconds} s") from None
    except OSError as error:
        raise OSError(
            f"bundle {bundle.path} was made elsewhere, and no process could be started to try its "
            f"graphs ({error}); where you trust its maker, set {SETTING}=never."
        ) from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        answer = {}
    if done.returncode == 0 and answer.get("passed") == bundle.digest:
        return
    text = printable(str(answer.get("text", "")))[:600]
    kinds: dict[Any, type[Exception]] = {"ValueError": ValueError, "ImportError": ImportError}
    if (kind := kinds.get(answer.get("error"))) is not None:
        raise kind(text)
    if text:
        what = f"its graphs failed in a process with {memory / (1 << 30):.1f} GiB"
        raise broken(bundle.path, f"{what} ({text.rstrip('.')})")
    name = signal_of(done.returncode)
    if name == "SIGXCPU":
        raise slow(bundle, f"{seconds} s of processor time")
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    raise broken(
        bundle.path,
        f"its graphs ended the process that tried them ({name or printable(''.join(last))[:200]})",
    )


def slow(bundle: Bundle, limit: str) -> ValueError:
    """The error for a trial that was stopped."""
    return ValueError(
        f"bundle {bundle.path} cannot be used: its graphs did not end within {limit} in the"
        f" process that tried them; where you trust its maker, set {SETTING}=never."
    )


def signal_of(code: int) -> str | None:
    """The signal that ended a process; None where it ended by itself."""
    try:
        return signal.Signals(-code).name if code < 0 else None
    except ValueError:
        return f"signal {-code}"


def python() -> str:
    """An interpreter that is this one: where Python is embedded, sys.executable is none."""
    name = Path(sys.executable or "").name.lower()
    if name.startswith(("python", "pypy")):
        return sys.executable
    at = Path(sys.base_prefix)
    return str(at / "python.exe" if os.name == "nt" else at / "bin" / "python3")
