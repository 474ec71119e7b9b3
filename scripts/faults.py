"""What kill -9, full disks, read-only directories, rivals and clocks do to convert, export, run.

    python scripts/faults.py [--kills 300] [--json results/cpu/faults.json] [--programs FILE]

Every tool works on a tiny model in children forked from a warmed parent, hundreds of times. After
each fault: what lies under the final name is the old result or the new one, byte for byte; going on
gives the same bytes as an undisturbed run; no temporary files pile up. Exit code 1 where that is
not so; the JSON says where.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

TOOLS = ("convert", "stream", "export", "run")
# Case -> tries in a full run of 300 kills and in a short one.
TRIES = {"kill": (300, 3), "term": (40, 1), "full": (40, 1), "two": (30, 1), "clock": (30, 1),
         "times": (30, 2), "traced": (10, 0)}  # fmt: skip


def main() -> int:
    """Exit code 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, help="of each tool; the other cases in proportion")
    parser.add_argument("--short", action="store_true", help="a few tries of everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--programs", type=Path, help="where traced graphs are kept between runs")
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="d2m-faults-"))
    os.environ["D2M_CACHE"] = str(root / "cache")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        answer = faults(root, asked)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if asked.json:
        from d2m.files import write_json

        write_json(asked.json, answer)
    print(json.dumps(answer, indent=2, sort_keys=True))
    return int(answer["failures"] > 0)


def faults(root: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """All cases, one after the other."""
    from faulting import kills, places
    from faulting.tools import Tools
    from faulting.tries import attempt

    began = time.monotonic()
    share = (asked.kills or 300) / 300

    def tries(case: str) -> int:
        long, short = TRIES[case]
        return short if asked.short else max(1, round(long * share))

    tools = Tools(root, asked.programs)
    made = attempt(tools.make_bundles, root)
    assert made.code == 0, made.told
    mounts = places.can_mount(root / "mount")
    rows: dict[str, Any] = {}

    def case(name: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        start = time.monotonic()
        rows[name] = work(*arguments) | {"seconds": round(time.monotonic() - start, 1)}
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)

    told_by = {}
    for tool in TOOLS:
        if asked.short and tool == "stream":
            continue
        told_by[tool] = known = kills.reference(tools, tool)
        for name, number in (("kill", signal.SIGKILL), ("term", signal.SIGTERM)):
            case(f"{number.name}, {tool}", kills.struck, tools, tool, known, tries(name), number,
                 asked.seed)  # fmt: skip
        case(f"full disk, {tool}", places.full, tools, tool, known, tries("full"), asked.seed,
             mounts)  # fmt: skip
        if mounts or os.geteuid():
            case(f"read-only, {tool}", places.read_only, tools, tool, mounts)
    if tries("traced"):
        known = kills.reference(tools, "export_traced")
        case("SIGKILL, export with tracing", kills.struck, tools, "export_traced", known,
             tries("traced"), signal.SIGKILL, asked.seed)  # fmt: skip
    case("two exports at once", kills.two_at_once, tools, tries("two"), asked.seed)
    case("clock jumps", places.jumping, tools, told_by["convert"], tries("clock"), asked.seed)
    case("times of files", places.remembered, tools, tries("times"), asked.seed)
    return {
        "what": "scripts/faults.py",
        "cases": rows,
        "kills": sum(row["struck"] for name, row in rows.items() if name.startswith("SIGKILL")),
        "failures": sum(len(row["failures"]) for row in rows.values()),
        "seed": asked.seed,
        "seconds": round(time.monotonic() - began, 1),
        "platform": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "clock": "Python's clock and the files' times jump; the kernel's clock stays",
    }


if __name__ == "__main__":
    sys.exit(main())
