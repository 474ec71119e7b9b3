"""From a synthetic FLUX to a bundle: peak memory, time and bytes of make, convert and export.

    python -m scripts.bench.big --blocks 1D+1S [--work DIR] [--keep] [--json FILE]
                                [--plans portable,86,89,120]
    python -m scripts.bench.big --flux2 flux2-klein-4b ...    (its text encoder and VAE whole too)

Every stage is a process of its own; its peak resident memory is the kernel's figure for it and for
the processes it waited for, compilers of plans among them. Beside it stands what `d2m plan`
had estimated. Directories are removed at the end, unless --keep; with --work a stage whose
result is there is not run again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.figures import ROOT, options, write_figures

RECIPE = ROOT / "d2m/families/flux/presets/19d-38s/L.json"
ANY_DEPTH = ROOT / "d2m/recipe/presets/L.json"  # FLUX.2's blocks share their modulation already


def main(argv: list[str] | None = None) -> int:
    """Run the stages, print and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--blocks", default="1D+1S", help="double and single (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/big"), help="(%(default)s)")
    parser.add_argument("--plans", default="portable,86,89,120", help="'' for none (%(default)s)")
    parser.add_argument(
        "--config", type=Path, help="sizes, as scripts.bench.random_flux takes them"
    )
    parser.add_argument("--flux2", help="flux2-klein-4b or -9b, in place of FLUX.1")
    parser.add_argument("--keep", action="store_true", help="leave the directories")
    arguments = parser.parse_args(argv)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    dense, sparse, bundle = (work / name for name in ("dense", "sparse", "bundle"))
    d2m = [sys.executable, "-m", "d2m"]
    plans = ["--trt-rtx", "--sm", arguments.plans] if arguments.plans else []
    recipe = ANY_DEPTH if arguments.flux2 else RECIPE
    magnitude = ["--init-only", "--importance", "magnitude", "--recipe", str(recipe)]
    sizes = ["--config", str(arguments.config)] if arguments.config else []
    make = ["scripts.bench.random_flux", str(dense), "--blocks", arguments.blocks, *sizes]
    if arguments.flux2:
        make = ["scripts.bench.random_flux2", str(dense), "--model", arguments.flux2]
    stages = {
        "make": (dense, [sys.executable, "-m", *make]),
        "convert": (sparse, [*d2m, "convert", str(dense), "-o", str(sparse), *magnitude]),
        "export": (bundle, [*d2m, "export", str(sparse), "-o", str(bundle), "--link", *plans]),
    }
    what = {"model": arguments.flux2} if arguments.flux2 else {"blocks": arguments.blocks}
    notes = work / "stages.json"  # of stages that are not run again
    stages_before = json.loads(notes.read_text()) if notes.is_file() else {}
    figures: dict[str, Any] = {**what, "stages": stages_before}
    for name, (out, command) in stages.items():
        if out.exists():
            print(f"{name}: {out} is there")
            continue
        estimated = estimate(name, dense, sparse, bool(plans), recipe)
        measured = run(command) | {"bytes": on_disk(out)}
        figures["stages"][name] = measured | ({"foretold": estimated} if estimated else {})
        notes.write_text(json.dumps(figures["stages"]))
        print(f"{name}: {json.dumps(figures['stages'][name])}", flush=True)
    figures["bundle"] = contents(bundle)
    figures["together"] = on_disk(sparse, bundle)
    print(json.dumps(figures["bundle"]))
    if arguments.json:
        write_figures(arguments.json, "scripts.bench.big", figures)
    if not arguments.keep:
        for out, _ in stages.values():
            shutil.rmtree(out, ignore_errors=True)
        notes.unlink(missing_ok=True)
    return 0


def run(command: list[str]) -> dict[str, Any]:
    """Run to its end: seconds of wall clock and CPU, peak resident bytes. Or SystemExit."""
    began = time.monotonic()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def estimate(
    stage: str, dense: Path, sparse: Path, plans: bool, recipe: Path
) -> dict[str, Any] | None:
    """What `d2m plan` says of a stage, before it runs."""
    from d2m.plan import needs as resources

    if stage == "convert":
        found = resources.convert_needs(dense, recipe)
    elif stage == "export":
        found = resources.export_needs(sparse, link=True, plans=2 if plans else 0)
    else:
        return None
    return {"peak_bytes": found.ram, "bytes": found.disk}


def on_disk(*folders: Path) -> int:
    """Bytes that the files take, one with two names counted once."""
    files = {
        (stat.st_dev, stat.st_ino): stat.st_size
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and (stat := path.stat())
    }
    return sum(files.values())


def contents(bundle: Path) -> dict[str, Any]:
    """Bytes of a bundle by kind of file, and its sets of plans."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    sizes: dict[str, int] = {}
    for name, row in manifest["files"].items():
        kind = "plans" if name.endswith(".plan") else name.rpartition(".")[2]
        sizes[kind] = sizes.get(kind, 0) + row["size"]
    record = manifest["components"]["transformer"]
    linked = sum(manifest["files"][name]["size"] for name in record.get("shards", ()))
    plans = {target: len(row["files"]) for target, row in manifest["plans"].items()}
    return {"bytes_by_kind": sizes, "linked_bytes": linked, "plans": plans}


if __name__ == "__main__":
    sys.exit(main())
