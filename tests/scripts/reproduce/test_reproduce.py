"""scripts/reproduce/__main__.py: which rows are to be done, in which order, and two of them,
done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def reproduce(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from scripts.reproduce import __main__ as reproduce

    return reproduce


def names(tasks) -> list[tuple[str, int]]:
    return [(row.name, seed) for row, seed in tasks]


def test_every_row_with_every_seed(reproduce) -> None:
    from scripts.reproduce.rows import ROWS

    found = names(reproduce.tasks(reproduce.parse(["--seeds", "3,4"])))
    assert len(found) == len(set(found))
    assert set(found) == {(row.name, seed) for row in ROWS for seed in (3, 4)}
    assert [seed for _, seed in found] == sorted(seed for _, seed in found)  # seed after seed


def test_what_a_row_needs_comes_before_it(reproduce) -> None:
    found = names(reproduce.tasks(reproduce.parse(["--only", "S k=1, joint", "--seeds", "0"])))
    assert found == [("L", 0), ("S", 0), ("S k=1", 0), ("joint", 0)]
    with pytest.raises(ValueError, match="row 'Q' is not known; expected one of dense, L"):
        reproduce.tasks(reproduce.parse(["--only", "Q"]))


def test_done_rows_are_missing_only_where_their_model_is_needed(reproduce, tmp_path) -> None:
    from scripts.reproduce.rows import named
    from scripts.reproduce.work import Settings, identity, model_dir, result_file

    options = reproduce.parse(["--only", "S", "--seeds", "0"])
    settings = Settings(options.dense, tmp_path / "work", tmp_path, 600, 600)
    found = reproduce.tasks(options)
    assert names(reproduce.missing(found, settings)) == [("L", 0), ("S", 0)]

    def finish(name: str) -> None:
        answer = {"identity": identity(named(name), 0, settings)}
        result_file(named(name), 0, settings).write_text(json.dumps(answer))

    finish("L")  # judged, but S needs its model, which is gone
    assert names(reproduce.missing(found, settings)) == [("L", 0), ("S", 0)]
    model_dir(named("L"), 0, settings).mkdir(parents=True)
    assert names(reproduce.missing(found, settings)) == [("S", 0)]
    finish("S")
    model_dir(named("L"), 0, settings).rmdir()  # nothing is left that needs it
    assert reproduce.missing(found, settings) == []
    other = Settings(options.dense, tmp_path / "work", tmp_path, 700, 600)
    assert names(reproduce.missing(found, other)) == [("L", 0), ("S", 0)]


def test_the_table_alone_trains_nothing(reproduce, tmp_path, capsys) -> None:
    before = (ROOT / "docs" / "results.md").read_bytes()
    assert reproduce.main(["--table", "--results", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "table.md", "report.html"}
    assert "0 results" in capsys.readouterr().out
    # The document shows the default results alone.
    assert (ROOT / "docs" / "results.md").read_bytes() == before


@pytest.mark.slow
def test_two_rows_are_made_judged_and_resumed(tmp_path: Path) -> None:
    """L and S from the dense teacher, hardly trained; a second run does nothing but the tables."""
    options = ["--only", "L,S", "--seeds", "0", "--steps", "6", "--n", "12", "--jobs", "2"]
    options += ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    command = [sys.executable, "-m", "scripts.reproduce", *options]
    for expected in ("2 of 2 rows to do", "0 of 2 rows to do"):
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout
    answer = json.loads((tmp_path / "results/summary.json").read_text())
    rows = {row["name"]: row for row in answer["rows"]}
    assert [rows[name]["score"]["n"] for name in ("L", "S")] == [12, 12]
    assert rows["S"]["flops_vs_dense"] < rows["L"]["flops_vs_dense"] < 1
    assert rows["S"]["steps"] > rows["L"]["steps"] == 6 and rows["M"]["score"] is None
    assert (tmp_path / "results/pareto.svg").is_file()
