"""What this machine has and how fast it is: cores, memory, disk, GPUs, and two quick measurements.

Needs no torch. What cannot be known here (memory on a system without /proc) is None, never a guess.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

WRITTEN = 64 << 20  # bytes of the disk's test
SIDE = 768  # of the matrices multiplied
MEASURE = 0.3  # seconds


def cores() -> int:
    """Cores that this process may use: affinity, and a container's quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max":
            return max(1, min(found or 1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return found or 1


def free_cores(seconds: float = 0.3) -> int:
    """Cores that nothing computes on at this moment, from 1 to `cores()`; all where unknown.

    A thread for each and no more: two threads of which one waits for its turn are slower than one
    (python -m scripts.bench.threads measures it).
    """

    def ticks() -> tuple[int, int]:
        row = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return row[3] + row[4], sum(row)  # idle and waiting for a disk; all

    try:
        idle, total = ticks()
        time.sleep(seconds)
        later, end = ticks()
    except (OSError, ValueError, IndexError):
        return cores()
    share = (later - idle) / max(end - total, 1)
    return max(1, min(cores(), round(share * (os.cpu_count() or 1))))


def memory() -> tuple[int, int] | None:
    """(total, available) bytes, of the container where that has a limit; None where unknown."""
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        if limit != "max":
            total, free = min(total, int(limit)), min(free, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return total, free


def disk_free(path: str | os.PathLike[str]) -> int:
    """Bytes free where `path` is or will be."""
    return shutil.disk_usage(existing(Path(path))).free


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def disk_speed(path: str | os.PathLike[str]) -> float | None:
    """Bytes a second that reach the disk at `path` (64 MiB written and synced), None if read-only.

    A program that reads them back finds them in memory, so this is the slower of the two.
    """
    piece = os.urandom(1 << 20)
    folder = existing(Path(path))
    try:
        with tempfile.TemporaryFile(dir=folder if folder.is_dir() else folder.parent) as file:
            began = time.perf_counter()
            for _ in range(WRITTEN // len(piece)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            return WRITTEN / (time.perf_counter() - began)
    except OSError:
        return None


def processor() -> dict[str, float]:
    """{"flops": a second in float32 on the threads numpy takes, "share": of a core one thread got}.

    A share far below 1 says that other processes compute: everything takes so much longer.
    """
    import numpy as np

    a = np.ones((SIDE, SIDE), np.float32)
    a @ a
    done, best = 0.0, float("inf")
    began = time.perf_counter()
    while done < MEASURE:
        before = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - before)
        done = time.perf_counter() - began
    began, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - began < MEASURE:
        pass
    share = (time.thread_time() - used) / (time.perf_counter() - began)
    return {"flops": 2 * SIDE**3 / best, "share": min(1.0, share)}


def gpus() -> list[dict[str, Any]]:
    """GPUs as the driver shows them: name, memory, free (bytes), driver, sm (89); [] for none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    fields = "name,memory.total,memory.free,driver_version,compute_cap"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in output.strip().splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        try:
            name, total, free, driver, capability = cells
            sizes = {"memory": int(total) << 20, "free": int(free) << 20}
            sm = int(capability.replace(".", ""))
        except ValueError:
            continue  # "[N/A]" of a card that shares its memory with the CPU
        found.append({"name": name, **sizes, "driver": driver, "sm": sm})
    return found


def machine(path: str | os.PathLike[str] = ".") -> dict[str, Any]:
    """All of it, with the measurements (about a second), `path` being where files will be written.

    cores, ram, ram_available, disk_free (bytes or None), disk_speed (bytes/s or None), flops (a
    second), share (of a core), gpus.
    """
    ram = memory()
    return {
        "cores": cores(),
        "ram": ram[0] if ram else None,
        "ram_available": ram[1] if ram else None,
        "disk_free": disk_free(path),
        "disk_speed": disk_speed(path),
        **processor(),
        "gpus": gpus(),
    }
