"""The paper's comparisons on a dense teacher: all models of the table, several seeds, resumable.

    python -m scripts.reproduce [--quick] [--seeds 0,1,2] [--only L,S] [--jobs 2] [--world emoji]

Every row (scripts/reproduce/rows.py) is converted from the dense teacher, judged on held-out
captions, and written to RESULTS/ROW-seedN.json at once when it is done; what is done is not done
again, what was interrupted goes on from its checkpoint. Then summary.json, table.md, pareto.svg and
report.html are written beside them from all results that are there and of these settings; `--table`
does only that, and rewrites the section of docs/results.md where RESULTS is shapes' default.
Before the emoji world's first run, `python -m scripts.reproduce.probe` measures which runs of
blocks are linear.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "shapes" / "reproduce"

from runtime.files.atomic import write_json, write_text  # noqa: E402
from scripts.reproduce import page, tables  # noqa: E402
from scripts.reproduce.rows import STEPS, WORLDS, Row, chain, named, rows_of  # noqa: E402
from scripts.reproduce.summary import gather, summary  # noqa: E402
from scripts.reproduce.work import Settings, finished, model_dir  # noqa: E402

Task = tuple[Row, int]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="30 steps, 36 images, one seed")
    parser.add_argument("--seeds", default="0,1,2", help="(%(default)s)")
    parser.add_argument("--only", help="rows, with commas; all by default")
    parser.add_argument("--steps", type=int, default=STEPS, help="of stages 1 and 2 (%(default)s)")
    parser.add_argument("--world", choices=WORLDS, default="shapes", help="(%(default)s)")
    parser.add_argument("--n", type=int, help="images judged a row (shapes 600, emoji 1000)")
    parser.add_argument("--jobs", type=int, help="rows at a time; default: one a core")
    parser.add_argument("--dense", help="default: models/WORLD-dense")
    parser.add_argument("--work", type=Path, help="default: out/reproduce, out/reproduce-emoji")
    parser.add_argument("--results", type=Path, help="default: results/WORLD/reproduce")
    parser.add_argument("--table", action="store_true", help="train nothing, write the tables")
    options = parser.parse_args(argv)
    own = "" if options.world == "shapes" else f"-{options.world}"
    options.dense = options.dense or str(ROOT / "models" / f"{options.world}-dense")
    options.work = options.work or ROOT / "out" / f"reproduce{own}"
    options.n = options.n or (1000 if own else 600)
    if options.quick:
        options.steps, options.n, options.seeds = 30, 36, options.seeds.split(",")[0]
    default = ROOT / "out" / f"reproduce-quick{own}" if options.quick else None
    regular = RESULTS.parents[1] / options.world / "reproduce" if own else RESULTS
    options.results = options.results or default or regular
    if options.quick:
        options.work = options.work.with_name(options.work.name + "-quick-models")
    return options


def tasks(options: argparse.Namespace) -> list[Task]:
    """What is to be done: seed after seed, most telling first, starts before what needs them."""
    seeds = [int(each) for each in options.seeds.split(",")]
    rows = (
        [named(name.strip()) for name in options.only.split(",")]
        if options.only
        else rows_of(options.world)
    )
    asked = [(row, seed) for seed in seeds for row in rows]
    every = [(each, seed) for row, seed in asked for each in chain(row)]
    return list(dict.fromkeys(every))


def missing(found: list[Task], settings: Settings) -> list[Task]:
    """Tasks without a result, and those whose model another task needs and that is not there."""
    left = {task for task in found if finished(*task, settings) is None}
    needed = {
        (each, seed)
        for row, seed in left
        for each in chain(row)[:-1]
        if not model_dir(each, seed, settings).is_dir()
    }
    return [task for task in found if task in left | needed]


def run(found: list[Task], settings: Settings, jobs: int) -> list[Task]:
    """Run tasks, `jobs` at a time, each in its own process; those that failed."""
    own = str(max(1, (os.cpu_count() or 1) // jobs))
    threads = os.environ.get("OMP_NUM_THREADS") or own
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment["PYTHONPATH"] = str(ROOT)
    waiting, failed = list(found), []
    logs = settings.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def work(task: Task) -> int:
        row, seed = task
        command = [sys.executable, "-m", "scripts.reproduce.work", row.name, str(seed)]
        command.append(json.dumps(dataclasses.asdict(settings), default=str))
        with open(logs / f"{row.name}-{seed}.log", "ab") as log:
            return subprocess.run(command, env=environment, stdout=log, stderr=log).returncode

    def ready(task: Task) -> bool:
        needs = (named(task[0].needs), task[1]) if task[0].needs else None
        return needs not in waiting and needs not in under_way.values()

    under_way: dict[Future[int], Task] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or under_way:
            for task in [task for task in waiting if ready(task)][: jobs - len(under_way)]:
                waiting.remove(task)
                under_way[pool.submit(work, task)] = task
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                row, seed = task = under_way.pop(future)
                result = finished(row, seed, settings)
                if future.result() or result is None:
                    failed.append(task)
                    log = logs / f"{row.name}-{seed}.log"
                    print(f"{row.name} (seed {seed}): failed, see {log}", flush=True)
                    continue
                done = len(found) - len(waiting) - len(under_way)
                rate, took = result["score"]["overall"]["score"], result["seconds"]["all"]
                print(
                    f"[{done}/{len(found)}] {row.name} (seed {seed}): {rate:.3f}, {took} s",
                    flush=True,
                )
    return failed


def write(settings: Settings, document: Path | None = None) -> None:
    """summary.json, table.md, pareto.svg and report.html; the section of `document` too."""
    results, left_out = gather(settings)
    if left_out:
        print(f"results of other settings, left out: {', '.join(left_out)}", flush=True)
    answer = summary(results, left_out, settings.world)
    write_json(settings.results / "summary.json", answer)
    write_text(settings.results / "table.md", tables.table(answer))
    write_text(settings.results / "report.html", page.render(answer))
    plot = settings.results / "pareto.svg"
    if svg := page.pareto_svg(answer):
        write_text(plot, svg)
    else:
        plot.unlink(missing_ok=True)
    if document:
        link = os.path.relpath(plot, document.parent)
        tables.write_section(document, answer, link if svg else None)
    print(f"{sum(map(len, results.values()))} results in {settings.results}: table.md, report.html")


def main(argv: list[str] | None = None) -> int:
    """Do what is missing, then write the tables; 1 where a row failed."""
    options = parse(argv)
    where = (options.dense, options.work, options.results)
    settings = Settings(*where, options.steps, options.n, options.world)
    failed: list[Task] = []
    if not options.table:
        left = missing(tasks(options), settings)
        print(f"{len(left)} of {len(tasks(options))} rows to do; models in {settings.work}")
        failed = run(left, settings, options.jobs or os.cpu_count() or 1)
    shown = options.table and options.results == RESULTS
    write(settings, ROOT / "docs" / "results.md" if shown else None)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
