"""The sparse layer, blocks and a whole step on a GPU, correctness first; JSON under results/.

    python -m scripts.gpu [--sections ceilings,correctness,...] [--seconds 540] [--again]
    python -m scripts.gpu --toy        # tiny sizes on the CPU: exercises every path

Needs torch (and triton for our kernels), no diffusers. Every cell is written when it is measured; a
run that is stopped, by --seconds or by anything else, goes on where it was. A cell that fails keeps
its error and is tried again by the next run. Exit code 1 where a realisation is wrong, 2 where
there is no GPU; 3 where --seconds ended before the cells did.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ALL = "ceilings,correctness,layer,blocks,step,shapes"


def machine(device: Any) -> dict[str, Any]:
    """What the figures were measured on, and with which releases."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None,
        "device": platform.machine(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    if device.type == "cuda":
        row = torch.cuda.get_device_properties(device)
        found |= {
            "device": row.name,
            "sm": f"{row.major}{row.minor}",
            "multiprocessors": row.multi_processor_count,
            "l2_bytes": row.L2_cache_size,
            "memory_bytes": row.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def folder_name(device: str) -> str:
    """results/h200 for "NVIDIA H200", results/<name> for others."""
    name = re.sub(r"nvidia|geforce|80gb|hbm3e?|pcie|sxm\d?", "", device.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "gpu"


def write(path: Path, answer: dict[str, Any]) -> None:
    """At once or not at all: a killed run must not lose what earlier ones measured."""
    from runtime.files.atomic import write_text

    write_text(path, json.dumps(answer, indent=1, sort_keys=True) + "\n")  # NaN is an answer here


def show(name: str, record: dict[str, Any]) -> str:
    """One cell as a line."""
    known = ("ms", "tflops", "gb_s", "error", "ok", "seconds", "psnr_to_ort", "skipped", "failed")
    parts = [f"{key} {record[key]}" for key in known if key in record]
    if record.get("peak_bytes"):
        parts.append(f"peak {record['peak_bytes'] / 2**30:.2f} GiB")
    return f"{name:<58} {'  '.join(parts)}"


def run(setting: Any, sections: list[str], answer: dict[str, Any], path: Path, until: float) -> int:
    """Measure what is missing; returns the number of cells that were left for another run."""
    from scripts.gpu.cells import SECTIONS, clean

    left = 0
    for section in sections:
        for name, work in SECTIONS[section](setting):
            done = answer["cells"].get(name)
            if done is not None and "failed" not in done:
                continue
            if time.monotonic() > until:
                left += 1
                continue
            start = time.monotonic()
            try:
                record = work()
            except Exception as error:  # one cell must not end the others
                record = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            clean(setting.device)
            record["took_s"] = round(time.monotonic() - start, 2)
            answer["cells"][name] = record
            print(show(name, record), flush=True)
            write(path, answer)
    return left


def main() -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=ALL, help=f"some of {ALL}")
    parser.add_argument("--seconds", type=float, default=540, help="start no cell after these")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--again", action="store_true", help="measure the sections' cells anew")
    parser.add_argument("--json", type=Path, help="default: results/<device>/bench_gpu.json")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    sections = [part for part in given.sections.split(",") if part]
    unknown = sorted(set(sections) - set(ALL.split(",")))
    if unknown:
        print(
            f"error: --sections has {', '.join(unknown)}, expected some of {ALL}.", file=sys.stderr
        )
        return 2
    import torch

    if not given.toy and not torch.cuda.is_available():
        print(
            "error: torch sees no GPU, expected one; run this on a machine with an NVIDIA GPU, or"
            " with --toy to exercise it on the CPU.",
            file=sys.stderr,
        )
        return 2
    from scripts.gpu.setting import real, toy

    device = torch.device("cpu" if given.toy else "cuda")
    found = machine(device)
    name = "toy" if given.toy else folder_name(found["device"])
    path = given.json or ROOT / "results" / name / "bench_gpu.json"
    answer: dict[str, Any] = {"cells": {}}
    if path.is_file():
        answer = json.loads(path.read_text())
        if answer.get("machine", {}).get("device") != found["device"]:
            print(
                f"error: {path} was measured on {answer.get('machine', {}).get('device')}, expected"
                f" {found['device']}; give another name with --json.",
                file=sys.stderr,
            )
            return 2
    if given.again:
        cells = answer["cells"].items()
        answer["cells"] = {k: v for k, v in cells if k.split("/")[0] not in sections}
    setting = (toy if given.toy else real)(device)
    answer |= {
        "command": "python -m scripts.gpu",
        "date": date.today().isoformat(),
        "machine": found,
        "setting": {
            "image_tokens": setting.image,
            "text_tokens": setting.text,
            "width": setting.size.width,
            "experts": setting.size.experts,
            "top_k": setting.size.top_k,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "adaln": "full",
            "toy": given.toy,
        },
    }
    left = run(setting, sections, answer, path, until)
    write(path, answer)
    wrong = [name for name, row in answer["cells"].items() if row.get("ok") is False]
    failed = [name for name, row in answer["cells"].items() if "failed" in row]
    print(f"{path}: {len(answer['cells'])} cells, {len(failed)} failed, {left} left")
    for name in wrong:
        print(f"WRONG: {show(name, answer['cells'][name])}")
    return 1 if wrong else 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
