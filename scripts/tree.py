"""Write the README's file tree: remarks are the first lines of the files' docstrings.

python scripts/tree.py            rewrites the section in README.md
python scripts/tree.py --check    exits 1 where it is not up to date
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"(## The file tree\n\n```\n).*?(^```$)", re.M | re.S)
# Folders in the order in which a model passes through them, and what has no docstring.
REMARKS = {
    "d2m/": "torch: the whole conversion, and the command line",
    "d2m/cli/": "a file a group of commands; what they share, print and show of progress",
    "d2m/presets/": "recipes that come with d2m, as data; in folders those for one depth of model",
    "d2m/configs/": "configs of models that can be planned for without their weights",
    "calib/": "torch and numpy: what is learnt by running the dense model; the shapes world",
    "export/": "onnx: a sparse checkpoint becomes a bundle; parity",
    "runtime/": "numpy: a bundle becomes an image; no torch, no diffusers",
    "runtime/files/": "what all packages may use: standard library and numpy alone",
    "runtime/default/": "the bundle that ships with the package",
    "models/shapes-dense/": "the embedded dense teacher, a diffusers FluxPipeline",
    "docs/": "guide, tutorial, specifications, troubleshooting; its commands run in a test",
    "results/": "figures of the benchmarks, as JSON",
    "scripts/": "what is run by hand",
    "scripts/demo": "the whole way in one command",
    "scripts/test": "ruff, mypy and pytest in one command",
    "scripts/install.sh": "what both source: makes .venv, installs from constraints.txt",
    "scripts/reproduction/": "the rows, the work and the tables of reproduce.py",
    "scripts/teacher/": "the stages of train_teacher.py",
    "tests/": "mirrors the packages; tiny but genuine FLUX pipelines in tiny.py",
    "constraints.txt": "one set of versions that works together",
    "pyproject.toml": "packages, extras, and the settings of pytest, ruff and mypy",
    "Dockerfile": "a slim stage that draws and a toolchain stage",
    "LOG.md": "dated measurements and decisions, the negative ones too",
}


def remark(path: Path) -> str:
    """The first line of a Python file's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].removesuffix(".")


def tree() -> str:
    """One line per file, two spaces of indent per folder, two spaces before the remark."""
    rows: list[tuple[int, str, str]] = []
    for name, text in REMARKS.items():
        if not (ROOT / name).exists():
            continue
        parent, _, last = name.rstrip("/").rpartition("/")
        indent = 1 if parent in ("d2m", "runtime", "scripts") else 0
        rows.append((indent, name if not indent else last + "/" * name.endswith("/"), text))
        for path in sorted((ROOT / name).glob("*.py")) if name != "tests/" else ():
            if path.name != "__init__.py":
                rows.append((indent + 1, path.name, remark(path)))
    width = max(2 * indent + len(name) for indent, name, _ in rows) + 2
    return "".join(f"{'  ' * i + name:<{width}}{text}".rstrip() + "\n" for i, name, text in rows)


def main(argv: list[str]) -> int:
    """Rewrite the section, or compare it with the files."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = SECTION.sub(lambda match: match[1] + tree() + match[2], old)
    if "--check" in argv:
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
