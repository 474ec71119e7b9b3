"""Who may import whom, read from the sources; and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("d2m", "calib", "export", "runtime")
# Package -> packages of ours that its files may import (anywhere, function bodies included).
# runtime.files is the ground that all stand on: the standard library and numpy.
MAY = {
    "d2m": {"d2m", "runtime.files"},
    "calib": {"calib", "d2m", "runtime.files"},
    "export": {"export", "d2m", "runtime"},
    "runtime": {"runtime"},
}
GROUND = "runtime.files"  # standard library and numpy: all may import it
TORCH_WORLD = {"torch", "diffusers", "transformers", "accelerate"}
ONNX_WORLD = {"onnx", "onnxscript", "onnx_ir", "polygraphy"}
HEAVY = TORCH_WORLD | ONNX_WORLD | {"tensorrt", "tensorrt_rtx", "cuda", "onnxruntime", "triton"}
# Files of the command line's own path: nothing heavy while they load.
LIGHT = (
    "d2m/__init__.py",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "d2m/cli").glob("*.py"))),
    "d2m/draw.py",
    "runtime/files/atomic.py",
    "runtime/files/extras.py",
)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    """(top-level module name or GROUND, statement) of every import below `tree`."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            name = node.module or ""
            found.append((GROUND if name.startswith(GROUND) else name.split(".")[0], node))
    return found


def at_load(tree: ast.Module) -> set[str]:
    """Modules imported while the file loads: outside functions and `if TYPE_CHECKING`."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {name for name, _ in imported(node)}
        waiting += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("package", OURS)
def test_packages_import_only_what_the_table_allows(package: str) -> None:
    assert sources(package), f"no sources in {package}/"
    for path in sources(package):
        allowed = MAY[package]
        if path.parent == ROOT / "d2m/cli":
            allowed = set(OURS)
        for name, node in imported(ast.parse(path.read_text())):
            if name in OURS and name not in allowed:
                ground = "runtime.files" in allowed and set(modules(node)) == {"runtime.files"}
                assert ground, f"{path}:{node.lineno} imports {name}"


def modules(node: ast.stmt) -> list[str]:
    """The first two parts of every module that an import names."""
    assert isinstance(node, ast.Import | ast.ImportFrom)
    if isinstance(node, ast.Import):
        full = [alias.name for alias in node.names]
    else:
        full = [f"{node.module}.{alias.name}" for alias in node.names]
    return [".".join(name.split(".")[:2]) for name in full]


def test_the_ground_imports_nothing_of_ours_but_itself_and_numpy() -> None:
    for path in sorted((ROOT / "runtime/files").glob("*.py")):
        for name, node in imported(ast.parse(path.read_text())):
            ours = name not in OURS or set(modules(node)) == {"runtime.files"}
            known = name in sys.stdlib_module_names or name in {"numpy", "runtime"}
            assert ours and known, f"{path}:{node.lineno} imports {name}"


def test_cli_imports_sideways_only_inside_command_bodies() -> None:
    for path in sorted((ROOT / "d2m/cli").glob("*.py")):
        assert not at_load(ast.parse(path.read_text())) & (set(OURS) - {"d2m"}), path


def test_runtime_never_imports_torch_or_onnx() -> None:
    for path in sources("runtime"):
        for name, node in imported(ast.parse(path.read_text())):
            assert name not in TORCH_WORLD | ONNX_WORLD, f"{path}:{node.lineno} imports {name}"


def test_runtime_names_backends_only_inside_functions_or_backend_files() -> None:
    for path in sources("runtime"):
        heavy = at_load(ast.parse(path.read_text())) & HEAVY
        own = {"ort.py": {"onnxruntime"}, "trt.py": {"tensorrt", "tensorrt_rtx", "cuda"}}
        assert heavy <= own.get(path.name, set()), f"{path} imports {heavy} while it loads"


@pytest.mark.parametrize("name", LIGHT)
def test_the_command_line_loads_nothing_heavy(name: str) -> None:
    assert not at_load(ast.parse((ROOT / name).read_text())) & HEAVY


def test_no_file_imports_inside_a_package_init_of_ours() -> None:
    for package in OURS:
        names = at_load(ast.parse((ROOT / package / "__init__.py").read_text()))
        assert not names & HEAVY, f"{package}/__init__.py imports {names & HEAVY} while it loads"


@pytest.mark.parametrize("module", ["runtime", "d2m", "d2m.cli", "calib", "export"])
def test_importing_loads_no_heavy_module(module: str) -> None:
    heavy = sorted(HEAVY)
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_no_pickle_and_no_eval_in_the_runtime() -> None:
    for path in sources("runtime"):
        tree = ast.parse(path.read_text())
        names = {name for name, _ in imported(tree)}
        assert not names & {"pickle", "dill", "joblib", "marshal", "shelve"}, path
        calls = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile"}, path


def test_no_utils_modules() -> None:
    names = {path.name for package in OURS for path in sources(package)}
    assert not names & {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
