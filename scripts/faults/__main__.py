"""What kill -9, full disks, read-only folders, two writers and clocks do to convert, export, run.

    python -m scripts.faults [--kills 300] [--json results/cpu/faults.json]
    python -m scripts.faults --clock [--json results/cpu/faults-clock.json]

Every tool works on a tiny model in children forked from a warmed parent, hundreds of times. After
each fault: what lies under the final name is the old result or the new one, byte for byte; going on
gives the same bytes as an undisturbed run; no temporary files pile up. Exit code 1 where that is
not so; the JSON says where. A run that was stopped goes on with the cases that are missing. With
--clock the system's clock, for these processes alone, is a year wrong and jumps, by libfaketime.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

SHORT = ("convert", "export", "run")
NAMES = {"export_traced": "export with tracing"}
TOOLS = ("convert", "stream", "export", "run")
# Case -> tries in a full run of 300 kills, and in a short one.
TRIES = {"kill": (300, 2), "term": (40, 1), "full": (40, 1), "two": (30, 1), "clock": (30, 1),
         "times": (30, 2), "traced": (10, 0)}  # fmt: skip


def main() -> int:
    """Exit code 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, help="of each tool; the other cases in proportion")
    parser.add_argument("--short", action="store_true", help="a few tries of everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--like", nargs=2, type=Path, metavar=("SPARSE", "BUNDLE"),
                        help="a bundle whose graphs spare the tracing")  # fmt: skip
    parser.add_argument("--clock", action="store_true", help="the system's clock alone")
    arguments = parser.parse_args()
    from scripts.faults import clock

    if arguments.clock and not clock.active():
        return clocked()
    root = Path(tempfile.mkdtemp(prefix="d2m-faults-"))
    os.environ["D2M_CACHE"] = str(root / "cache")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        answer = faults(root, arguments)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(answer, indent=2, sort_keys=True))
    return int(answer["failures"] > 0)


def clocked() -> int:
    """This script anew where clocks can be wrong; else a sentence that says why not."""
    from scripts.faults import clock

    preloaded = clock.library()
    if preloaded is None:
        print("no libfaketime: nothing was tried (Debian: apt-get install faketime)")
        return 0
    with tempfile.TemporaryDirectory(prefix="d2m-clock-") as folder:
        return clock.again(sys.argv, preloaded, Path(folder))


def faults(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases, one after the other; the JSON is written after each, and those in it are kept."""
    from runtime.files.atomic import write_json
    from scripts.faults import clock, kills, unwritable
    from scripts.faults.forked_commands import Tools
    from scripts.faults.tries import attempt

    rows = finished_cases(arguments)
    kills_wanted = arguments.kills or TRIES["kill"][0]

    def tries(case: str) -> int:
        long, short = TRIES[case]
        return short if arguments.short else max(1, round(long * kills_wanted / TRIES["kill"][0]))

    tools = Tools(root, tuple(arguments.like) if arguments.like else None)
    made = attempt(tools.make_bundles, root)
    assert made.code == 0, made.answer
    mounts, seed = unwritable.can_mount(root / "mount"), arguments.seed
    known: dict[str, kills.Reference] = {}

    def undisturbed(tool: str) -> kills.Reference:
        if tool not in known:
            known[tool] = kills.reference(tools, tool)
        return known[tool]

    def case(name: str, work: Callable[[], dict[str, Any]]) -> None:
        if name in rows:
            return
        start = time.monotonic()
        rows[name] = work() | {"seconds": round(time.monotonic() - start, 1)}
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
        if arguments.json:
            write_json(arguments.json, summary(rows, arguments))

    if arguments.clock:
        clock.cases(tools, undisturbed, arguments.short, arguments.seed, case)
        return summary(rows, arguments)

    def interrupted(tool: str, kind: str, number: int) -> None:
        name = f"{signal.Signals(number).name}, {NAMES.get(tool, tool)}"
        case(
            name,
            lambda: kills.interrupted(tools, tool, undisturbed(tool), tries(kind), number, seed),
        )

    def full(tool: str) -> dict[str, Any]:
        return unwritable.full(tools, tool, undisturbed(tool), tries("full"), seed, mounts)

    def jumping() -> dict[str, Any]:
        return unwritable.jumping(tools, undisturbed("convert"), tries("clock"), seed)

    for tool in TOOLS if not arguments.short else SHORT:
        interrupted(tool, "kill", signal.SIGKILL)
        interrupted(tool, "term", signal.SIGTERM)
        case(f"full disk, {tool}", partial(full, tool))
        if mounts or os.geteuid():
            case(f"read-only, {tool}", partial(unwritable.read_only, tools, tool, mounts))
    case("two exports at once", lambda: kills.two_at_once(tools, tries("two"), seed))
    case("clock jumps", jumping)
    case("times of files", lambda: unwritable.remembered(tools, tries("times"), seed))
    if not arguments.short:
        interrupted("export_traced", "traced", signal.SIGKILL)
    return summary(rows, arguments)


def finished_cases(arguments: argparse.Namespace) -> dict[str, Any]:
    """Cases that an earlier run of the same size and seed has written."""
    if arguments.json is None or not arguments.json.is_file():
        return {}
    before = json.loads(arguments.json.read_text())
    same = before["seed"] == arguments.seed and before["kills_asked"] == arguments.kills
    rows: dict[str, Any] = before["cases"] if same else {}
    return rows


def summary(rows: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """What is recorded."""
    return {
        "what": "python -m scripts.faults",
        "cases": rows,
        "kills": sum(row["struck"] for name, row in rows.items() if name.startswith("SIGKILL")),
        "kills_asked": arguments.kills,
        "failures": sum(len(row["failures"]) for row in rows.values()),
        "seed": arguments.seed,
        "platform": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "clock": "by libfaketime"
        if arguments.clock
        else "Python's clock and the files' times jump; the kernel's clock stays",
    }


if __name__ == "__main__":
    sys.exit(main())
