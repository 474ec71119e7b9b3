"""The documents do what they say: boxes are run or say why not, links lead somewhere."""

import ast
import contextlib
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from tests.cases.documents import (
    DOCUMENTS,
    ELSEWHERE,
    INDEX,
    LANGUAGES,
    MARKS,
    README,
    ROOT,
    Box,
    boxes,
    parse_d2m,
    run,
    words,
    working_in,
)

# What a box with a mark must contain: a mark is a reason, not a way out.
REASONS = {
    "docker": r"\bdocker\b",
    "cluster": r"\b(kubectl|ray|serve run|torchrun|accelerate launch)\b",
    "network": r"\b(pip install|hf download|curl|git clone|calib\.emoji --get)",
    "gpu": r"--backend (trt|trt-rtx|ort-cuda)\b|nvidia-smi|gpu\.sh|tritonserver",
}
BASH = boxes(language="bash")
PROGRAMS = {"d2m", "python"}


@pytest.mark.parametrize("box", boxes(), ids=str)
def test_boxes_have_known_languages_and_reasons(box: Box) -> None:
    assert box.language in LANGUAGES and box.marks <= MARKS
    if box.language == "bash":
        for mark in box.marks & ELSEWHERE:
            assert re.search(REASONS[mark], box.text), f"{box} is marked {mark} for nothing"


def test_every_command_of_a_box_is_run_by_some_test() -> None:
    """No program but those that `run` knows, in boxes that run."""
    for box in BASH:
        if box.marks & ELSEWHERE or (box.document == "README.md" and box.line == 1):
            continue  # the README's first box: tests/test_scripts.py
        for command in box.commands():
            first = words(command)[0]
            assert re.match(r"(d2m|python|ls|cat|mkdir|cp|rm|test)$|[A-Z_0-9]+=", first), command


@pytest.mark.parametrize("box", BASH, ids=str)
def test_d2m_commands_parse(box: Box) -> None:
    names: dict[str, str] = {}
    for command in box.commands():
        row = words(command, names)
        if row[0] == "d2m":
            parse_d2m(row[1:])


def test_inline_commands_name_real_commands() -> None:
    from d2m.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    for document in DOCUMENTS:
        for line in re.findall(r"`d2m ([^`]*)`", document.read_text()):
            assert line.split()[0] in names, f"{document.name}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path) if path else document
        assert found.exists(), f"{document.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{document.name}: {target}"


def test_every_document_is_listed_in_the_index() -> None:
    text = INDEX.read_text()
    assert f"({INDEX.relative_to(ROOT).as_posix()})" in README.read_text()
    for path in DOCUMENTS:
        assert path in (README, INDEX) or f"({path.name})" in text, path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_modules_named_are_there(document: Path) -> None:
    """Paths from the repository's root in `code`, and what `python -m` runs."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    tops = r"(?:d2m|runtime|export|calib|scripts|tests|docs|results|models)"
    for path in re.findall(rf"`({tops}/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{document.name}: {path}"
    for module in re.findall(rf"python3? -m ({tops}(?:\.\w+)*)", document.read_text()):
        path = ROOT / module.replace(".", "/")
        runs = path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        assert runs, f"{document.name}: python -m {module}"


@pytest.mark.parametrize("box", boxes(language="python"), ids=str)
def test_python_boxes_are_python(box: Box) -> None:
    ast.parse(box.text)


def can_run(command: str) -> bool:
    """TensorRT-RTX is an extra."""
    return "--trt-rtx" not in command or importlib.util.find_spec("tensorrt_rtx") is not None


def run_document(document: Path, folder: Path, *, slow: bool) -> int:
    """Run a document's boxes from its top to its end; returns how many commands that were."""
    count, names, python = 0, {}, {}
    with working_in(folder):
        for box in boxes(document):
            if box.marks & ELSEWHERE or ("slow" in box.marks and not slow):
                continue
            if box.language == "python":
                exec(box.text, python)
                count += 1
            elif box.language == "bash" and not (document == README and box.line == 1):
                for command in box.commands():
                    if can_run(command):
                        run(command, names, short="slow" in box.marks)
                        count += 1
    return count


def has(document: Path, *, slow: bool) -> bool:
    """Whether a document has boxes that only slow tests run, or such as run always."""
    found = [box for box in boxes(document) if box.language in ("bash", "python")]
    found = [box for box in found if not box.marks & ELSEWHERE]
    return any(("slow" in box.marks) == slow for box in found)


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path != README and has(path, slow=False)],
    ids=lambda path: path.name,
)
def test_the_cheap_boxes_run(
    document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_document(document, tmp_path, slow=False) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if has(path, slow=True)], ids=lambda path: path.name
)
def test_whole_documents_run(
    document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every box that needs nothing from elsewhere, with fewer steps and pictures."""
    assert run_document(document, tmp_path, slow=True) > 0


def sentences() -> list[str]:
    """Every string in our sources, `…` in place of what an f-string fills in."""
    found = []
    for package in ("d2m", "calib", "export", "runtime"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def quoted() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", text, re.M)


def test_every_quoted_sentence_stands_in_the_code() -> None:
    """Pieces between `…` in order, in one string of the code."""
    everything = sentences()
    assert len(quoted()) > 30
    for sentence in quoted():
        pieces = [piece.strip() for piece in sentence.split("…") if len(piece.strip()) > 1]
        assert sum(map(len, pieces)) > 20, f"too little of a sentence: {sentence}"
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.S)
        assert any(pattern.search(text) for text in everything), f"nowhere in the code: {sentence}"


def test_the_bundles_specification_names_every_field() -> None:
    text = (ROOT / "docs" / "bundle.md").read_text()
    manifest = json.loads((ROOT / "runtime/default/manifest.json").read_text())
    component = manifest["components"]["transformer"]
    named = {*manifest, *component, *component["types"]["double"], *component["program"][0]}
    for section in ("defaults", "latents", "parameters"):
        named |= {*manifest[section]}
    named |= {*manifest["tokenizers"]["tokenizer"]}
    assert not [name for name in named if f"`{name}`" not in text]
    assert f"version {manifest['format']}" in text


def test_the_ops_specification_is_its_schema() -> None:
    from export.op.schema import INPUTS, OP, OPSET, TYPES, VERSION

    text = (ROOT / "docs" / "op.md").read_text()
    assert f"d2m::{OP}, versions 1 and {VERSION}" in text and OPSET
    names = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "double": "float64"}
    shown = set()
    for name, kind, what in INPUTS:
        shape = re.search(r"\[.*\]", what)
        assert shape
        listed = ", ".join(names[t.removeprefix("tensor(").rstrip(")")] for t in TYPES[kind])
        cell = kind if kind in shown else f"{kind}: {listed}"
        shown.add(kind)
        assert f"| input | `{name}` | {shape[0]} | {cell} |" in text


def test_marks_without_reason_are_found(tmp_path: Path) -> None:
    """The checks above do check: a box with a wrong mark, a program that no test runs."""
    box = Box("x.md", 1, "bash", frozenset({"gpu"}), "d2m inspect runtime/default\n")
    with pytest.raises(AssertionError, match="marked gpu for nothing"):
        test_boxes_have_known_languages_and_reasons(box)
    with contextlib.chdir(tmp_path), pytest.raises(AssertionError):
        run("sudo reboot", {})
    with contextlib.chdir(tmp_path), pytest.raises(AssertionError):
        run("d2m inspect nothing", {})
    assert not os.listdir(tmp_path)
