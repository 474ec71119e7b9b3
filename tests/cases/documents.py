"""README.md and docs/*.md read as documents: their boxes of commands, and how a test runs them.

A box is run unless a word after its language says why not: `slow` boxes run in slow tests,
`network`, `gpu`, `docker` and `cluster` ones need what a test does not have, and are only parsed.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from d2m.cli import app, main

ROOT = Path(__file__).resolve().parents[2]
README, INDEX = ROOT / "README.md", ROOT / "docs" / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "yaml", "json", "text", "onnx", ""}
ELSEWHERE = {"network", "gpu", "docker", "cluster"}  # what a box may need that is not here
MARKS = {"slow", *ELSEWHERE}
# What a short run puts in place of a document's figures.
SMALLER = {"--steps": "4", "--n": "12", "--runs": "1"}
TOOLS = {"ls", "cat", "mkdir", "cp", "rm", "test"}  # besides d2m and python, in boxes that run
FENCE = re.compile(r"^```(\w*)((?: [\w-]+)*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Box:
    """A fenced box: its document, line, language, marks and text."""

    document: str
    line: int
    language: str
    marks: frozenset[str]
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def commands(self) -> list[str]:
        """The lines of a shell box, continued ones joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if shlex.split(line, comments=True)]


def boxes(*paths: Path, language: str | None = None) -> list[Box]:
    """All boxes of documents, in order."""
    found = []
    for path in paths or DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            name = path.relative_to(ROOT).as_posix()
            box = Box(name, line, match[1], frozenset(match[2].split()), match[3])
            if language is None or box.language == language:
                found.append(box)
    return found


def words(command: str, names: dict[str, str] | None = None) -> list[str]:
    """A line as a shell would split it; $NAME from `names`."""
    text = string.Template(command).safe_substitute(names) if names is not None else command
    return shlex.split(text, comments=True)


def parse_d2m(arguments: list[str]) -> None:
    """Names, options and types are those of the command line; nothing is run."""
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    with command.make_context(arguments[0], arguments[1:]):
        pass


def smaller(arguments: list[str]) -> list[str]:
    """Arguments with the figures of a short run."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [SMALLER.get(before, word) for before, word in pairs]


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """A directory that looks like a checkout: models, runtime and so on are there to be read."""
    for name in ("models", "runtime", "results", "docs", "d2m"):
        (folder / name).symlink_to(ROOT / name)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(command: str, names: dict[str, str], *, short: bool = False) -> None:
    """Run one line in the current directory; assignments go into `names`."""
    if found := re.fullmatch(r"([A-Z_][A-Z0-9_]*)=(\S+)", command.strip()):
        names[found[1]] = words(found[2], names)[0]
        return
    row = words(command, names)
    if row[0] == "d2m" and row[1] == "serve":
        serve(row[2:])
    elif row[0] == "d2m":
        assert main(smaller(row[1:]) if short else row[1:]) == 0, command
    else:
        assert row[0] in {"python", *TOOLS}, command
        program = sys.executable if row[0] == "python" else row[0]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([program, *row[1:]], check=True, env=environment)


def serve(arguments: list[str]) -> None:
    """Start the server on a free port, wait until it is ready, end it as a supervisor would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    row = list(arguments)
    if "--port" in row:
        del row[row.index("--port") : row.index("--port") + 2]
    command = [sys.executable, "-m", "d2m", "serve", *row, "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        end = time.monotonic() + 180
        while True:
            assert server.poll() is None and time.monotonic() < end, command
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                time.sleep(0.5)
    finally:
        server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
