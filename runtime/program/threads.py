"""How many threads a CPU backend gets."""

from __future__ import annotations

import os

# Bytes of weights up to which a component gets one thread. Measured with the shapes model (13 MB,
# two cores, results/cpu/bench_model*.json of 2026-11-24): an image takes .137 s on one thread and
# .192 on two, one of eight of the sparse model .069 and .071: its matrices take less time than the
# other thread takes to wake. At width 1024 two threads pay.
SMALL = 64_000_000


def thread_count(threads: int | None = None, weights: int | None = None) -> int:
    """The argument, else D2M_THREADS, else the physical cores this process may use.

    `weights`: bytes of what is to run, where it is known; small models get one thread.
    """
    if threads is None:
        text = os.environ.get("D2M_THREADS", "").strip()
        if not text:
            return 1 if weights is not None and weights <= SMALL else physical_cores()
        if not text.isascii() or not text.isdigit():
            raise ValueError(f"D2M_THREADS is {text!r}, expected a whole number of threads.")
        threads = int(text)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(f"the number of threads is {threads!r}, expected 1 to 1024.")
    return threads


def physical_cores() -> int:
    """Physical cores among the CPUs of this process's affinity mask, and within its CPU quota.

    Two hyperthreads share one core's multipliers: a second thread there slows matmuls down.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return max(1, (os.cpu_count() or 2) // 2)
    cores = set()
    for cpu in cpus:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                cores.add(file.read().strip())
        except OSError:
            cores.add(str(cpu))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            return max(1, min(len(cores), -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass
    return len(cores)
