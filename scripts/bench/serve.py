"""Load on `d2m serve` from a second process: every request answered, and memory over a soak.

    python -m scripts.bench.serve [BUNDLE] [--requests 1000] [--soak 1800 --rate 2] [--json FILE]

The server is a process of its own; this one keeps more requests open than its queue holds, so that
the queue stays full and some are refused with 429 and come again after Retry-After. A request is
lost where no HTTP answer came. The soak goes on for so many seconds, with the same load or, where a
rate is given, so many requests a second, whose number of images goes from 1 to the batch and round
again. The server's resident memory is read each second; the slope is that of a line through the
means of blocks of the soak's samples, the first fifth left out, with a 95 % interval by Student's
t: means of blocks, because neighbouring samples are not independent. The server's own
figures of counting experts (/metrics) are kept too.
"""

from __future__ import annotations

import collections
import http.client
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from scripts.figures import ROOT, options, write_figures

BLOCKS = 20
# Student's t, two-sided 95 %, by degrees of freedom; above them the normal's with Cornish-Fisher.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def start(bundle: str | None, options: list[str]) -> tuple[subprocess.Popen[str], int]:
    """The server and its port; what it says goes on being read."""
    command = [sys.executable, "-m", "d2m", "serve", *([bundle] if bundle else [])]
    server = subprocess.Popen(
        [*command, "--port", "0", *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r" at http://127\.0\.0\.1:(\d+)", line):
            break
    else:
        raise RuntimeError(f"the server ended with code {server.wait()} before it served")
    threading.Thread(target=server.stderr.read, daemon=True).start()
    return server, int(found[1])


class Load:
    """Clients that send until `wanted` requests have an image or `until` has come."""

    def __init__(self, port: int, steps: int, patience: float) -> None:
        self.port, self.steps, self.patience = port, steps, patience
        self.codes: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.sent = self.lost = self.generated = 0
        self._lock = threading.Lock()

    def run(self, clients: int, wanted: float, until: float) -> None:
        """Returns when all clients are done."""
        threads = [
            threading.Thread(target=self.client, args=(wanted, until)) for _ in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def client(self, wanted: float, until: float) -> None:
        """One client: one request after the other, each until it has its image or is lost."""
        while time.monotonic() < until:
            with self._lock:
                if self.sent >= wanted:
                    return
                self.sent += 1
                seed = self.sent
            began = time.monotonic()
            while (code := self.once(seed)) == "429" and time.monotonic() < until:
                pass
            with self._lock:
                self.generated += code == "200"
                self.lost += not code.isdigit()
                if code == "200":
                    self.seconds.append(time.monotonic() - began)

    def pace(self, rate: float, until: float, most: int) -> None:
        """`rate` requests a second until then, of 1 to `most` images in turn, never two at once."""
        began = time.monotonic()
        while (now := time.monotonic()) < until:
            due = began + self.sent / rate
            if now < due:
                time.sleep(min(due, until) - now)
                continue
            self.sent += 1
            began += max(0.0, now - due - 5.0)  # a busy machine: no burst to make up for it
            code = self.once(self.sent, 1 + self.sent % most)
            self.generated += code == "200"
            self.lost += not code.isdigit()

    def once(self, seed: int, n: int = 1) -> str:
        """One HTTP request's status, or the name of the error where no answer came."""
        fields = {"prompt": f"a photo of {seed} circles", "steps": self.steps, "n": n}
        body = json.dumps(fields)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience)
        wait = 0.0
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/images/generations", body, headers)
            answer = connection.getresponse()
            data = json.loads(answer.read())
            code = str(answer.status)
            if code == "200" and not data["data"][0]["b64_json"]:
                code = "empty"
            wait = float(answer.headers.get("Retry-After", 0))
        except (OSError, ValueError, http.client.HTTPException) as error:
            code = type(error).__name__
        finally:
            connection.close()
        with self._lock:
            self.codes[code] += 1
        time.sleep(min(wait, 2.0))  # sooner than asked: the queue is to stay full
        return code


def server_figures(port: int) -> dict[str, Any]:
    """The server's own figures: what counting experts took of the time spent in steps."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = {name: float(v) for name, v in re.findall(r"^(\w+)(?:\{\})? (\S+)$", text, re.M)}
    ratios = [float(v) for v in re.findall(r"^d2m_expert_load_ratio\{.*\} (\S+)$", text, re.M)]
    counting, generating = found["d2m_expert_load_seconds_total"], found["d2m_step_seconds_sum"]
    return {
        "steps": found["d2m_expert_load_steps_total"],
        "seconds": round(counting, 2),
        "step_seconds": round(generating, 2),
        "share": round(counting / generating, 5) if generating else None,
        "busiest_over_mean": {
            "median": round(statistics.median(ratios), 2) if ratios else None,
            "largest": round(max(ratios), 2) if ratios else None,
        },
    }


def watch(pid: int, samples: list[tuple[float, float]], stop: threading.Event) -> None:
    """(seconds, resident MiB) of a process each second, from /proc."""
    page = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    while not stop.wait(1.0):
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            return
        samples.append((time.monotonic(), pages * page))


def cpu_seconds(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def slope(samples: list[tuple[float, float]]) -> dict[str, Any]:
    """MiB an hour with a 95 % interval, from means of blocks (see above)."""
    kept = samples[len(samples) // 5 :]
    count = min(BLOCKS, len(kept) // 5)
    if count < 4:
        return {"samples": len(samples), "mib_per_hour": None}
    size = len(kept) / count
    parts = [kept[round(i * size) : round((i + 1) * size)] for i in range(count)]
    hours = [statistics.fmean(moment for moment, _ in part) / 3600 for part in parts]
    mib = [statistics.fmean(value for _, value in part) for part in parts]
    middle, mean = statistics.fmean(hours), statistics.fmean(mib)
    spread = sum((h - middle) ** 2 for h in hours)
    found = sum((h - middle) * (m - mean) for h, m in zip(hours, mib, strict=True)) / spread
    rest = sum((m - mean - found * (h - middle)) ** 2 for h, m in zip(hours, mib, strict=True))
    freedom = count - 2
    t = T95.get(freedom) or 1.96 + 2.372 / freedom + 2.822 / freedom**2
    half = t * math.sqrt(rest / freedom / spread)
    return {
        "samples": len(samples),
        "blocks": count,
        "seconds": round(kept[-1][0] - kept[0][0], 1),
        "first_mib": round(mib[0], 2),
        "last_mib": round(mib[-1], 2),
        "mib_per_hour": round(found, 3),
        "low": round(found - half, 3),
        "high": round(found + half, 3),
    }


def main() -> int:
    """Exit code 1 where a request was lost or the server did not end well."""
    parser = options(__doc__)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of load after them")
    parser.add_argument("--rate", type=float, help="requests a second of the soak; as many as go")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-queue", type=int, default=16)
    parser.add_argument("--max-batch", type=int, default=8)
    arguments = parser.parse_args()
    names = ("workers", "max_queue", "max_batch")
    limits = {name: getattr(arguments, name) for name in names}
    server_options = [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]
    server, port = start(arguments.bundle, [*server_options, "--deadline=600"])
    samples: list[tuple[float, float]] = []
    stop = threading.Event()
    threading.Thread(target=watch, args=(server.pid, samples, stop), daemon=True).start()
    clients = (
        arguments.max_queue + arguments.max_batch * arguments.workers + 4
    )  # four more than fit
    load, soak = (Load(port, arguments.steps, patience=660.0) for _ in range(2))
    began = time.monotonic()
    load.run(clients, arguments.requests, math.inf)
    spent = time.monotonic() - began
    start_of_soak, used = len(samples), cpu_seconds(server.pid)
    until = time.monotonic() + arguments.soak
    if arguments.rate:
        soak.pace(arguments.rate, until, arguments.max_batch)
    elif arguments.soak:
        soak.run(clients, math.inf, until)
    used = cpu_seconds(server.pid) - used
    experts = server_figures(port)
    stop.set()
    server.terminate()
    code = server.wait(120)
    answer: dict[str, Any] = {
        "requests": load.sent,
        "drawn": load.generated,
        "lost": load.lost + soak.lost,
        "answers": dict(sorted(load.codes.items())),
        "seconds": round(spent, 1),
        "images_per_second": round(load.generated / spent, 3),
        "latency_median_s": round(statistics.median(load.seconds), 3) if load.seconds else None,
        "soak": {
            "seconds": arguments.soak,
            "rate": arguments.rate,
            "requests": soak.sent,
            "answers": dict(soak.codes),
            "server_cpu_seconds": round(used, 1),
        },
        "expert_load": experts,
        "memory": slope(samples[start_of_soak:] if arguments.soak else samples),
        "mib_by_minute": [round(value, 2) for _, value in samples[::60]],
        "peak_mib": round(max((value for _, value in samples), default=0.0), 1),
        "server_exit_code": code,
        "options": {"clients": clients, "steps": arguments.steps, **limits},
    }
    print(json.dumps(answer, indent=2, sort_keys=True))
    if arguments.json:
        write_figures(arguments.json, "scripts.bench.serve", answer)
    return int(bool(answer["lost"] or code or load.generated < arguments.requests))


if __name__ == "__main__":
    sys.exit(main())
