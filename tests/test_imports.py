"""Who may import whom, read from the sources; and what importing costs.

Every import counts: at the top of a file, inside a function and under TYPE_CHECKING.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Package -> packages of ours that its files may import. `runtime.files` is the ground: the
# standard library and numpy, so every package may stand on it, and `runtime.lora` on top of it:
# what d2m fuses into checkpoints and the runtime adds to bound weights is read by one reader.
MAY = {
    "d2m": {"d2m"},
    "calib": {"calib", "d2m"},
    "export": {"export", "d2m", "runtime"},
    "runtime": {"runtime"},
}
GROUND = ("runtime.files", "runtime.lora")
# Only the command line imports sideways, inside the bodies of its commands.
SIDEWAYS = "d2m.cli"
# The layers of a package, from the ground up: a folder (or a file beside the folders) imports only
# what stands in a line above it. Its own files it may import in any order that has no circle.
LAYERS = {
    "runtime": """
        files
        lora
        families cuda image
        bundle
        program tokenizer images
        control
        request
        ort trt latency_budget
        opened
        sampling
        pipeline
        inspect measure regenerate trial
        serve
        nvtriton""",
    "d2m": """
        recipe units shards
        families
        model kernels
        components
        generate distill
        plan
        unpack
        report
        lora
        convert
        cli
        __main__""",
    "export": """
        op
        graph
        quant
        text
        families
        checkpoint
        plans
        parity checks triton
        bundle
        control requantise add_encoder""",
    "calib": """
        score measure
        shapes emoji
        suites
        data budget""",
}
LARGEST = 15  # files in a folder
ROOMY = {"d2m/kernels"}  # one kernel a file
TORCH_WORLD = {"torch", "diffusers", "transformers", "accelerate"}
ONNX_WORLD = {"onnx", "onnxscript", "onnx_ir", "polygraphy"}
HEAVY = TORCH_WORLD | ONNX_WORLD | {"tensorrt", "tensorrt_rtx", "cuda", "onnxruntime", "triton"}
HEAVY |= {"matplotlib", "jinja2", "huggingface_hub", "fastapi", "pydantic"}
# A backend's own files, which are imported only when it is chosen.
OWN = {
    "runtime.ort": {"onnxruntime"},
    "runtime.trt": {"tensorrt", "tensorrt_rtx", "cuda"},
    "runtime.cuda": {"cuda"},
    "runtime.serve": {"fastapi", "pydantic"},
}


def rank(package: str, part: str) -> int | None:
    for number, line in enumerate(LAYERS[package].split("\n")):
        if part in line.split():
            return number
    return None


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything in the four packages."""
    found = {}
    for package in MAY:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(top: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import below `top`; a name of a module is part of it."""
    for node in ast.walk(top):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in modules() else str(node.module)), node.lineno


def at_load(top: ast.Module) -> set[str]:
    """Top-level packages imported while a file loads: not in functions or `if TYPE_CHECKING`."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(top.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {name.split(".")[0] for name, _ in imported(node)}
        waiting += ast.iter_child_nodes(node)
    return names


def inside(name: str, *folders: str) -> bool:
    return any(name == folder or name.startswith(folder + ".") for folder in folders)


def ours(package: str) -> Iterator[tuple[str, str, str]]:
    """(module, what of ours it imports, "file:line") for all imports of a package."""
    for name, path in modules().items():
        if inside(name, package):
            for target, line in imported(tree(path)):
                if target.split(".")[0] in MAY:
                    yield name, target, f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("package", MAY)
def test_packages_import_only_what_the_table_allows(package: str) -> None:
    seen = 0
    for name, target, where in ours(package):
        seen += 1
        allowed = target.split(".")[0] in MAY[package] or inside(target, *GROUND)
        assert allowed or inside(name, SIDEWAYS), f"{where} imports {target}"
    assert seen, f"no imports in {package}/"


@pytest.mark.parametrize("package", MAY)
def test_layers(package: str) -> None:
    """A folder imports only what stands below it; `import package` itself hands on anything."""
    for name, target, where in ours(package):
        mine, other = name.split("."), target.split(".")
        if len(mine) < 2 or other[0] != package or len(other) < 2 or mine[1] == other[1]:
            continue
        above, below = rank(package, mine[1]), rank(package, other[1])
        assert above is not None, f"{name} has no place in LAYERS"
        assert below is not None, f"{target} has no place in LAYERS"
        assert below < above, f"{where} imports {target}, which does not stand below {mine[1]}"


def test_no_circle() -> None:
    """No module reaches itself by imports, wherever in a file they stand."""
    edges = {
        name: {target for target, _ in imported(tree(path)) if target in modules()} - {name}
        for name, path in modules().items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, "circle: " + " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*way, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_files_do_not_import_the_face_of_their_own_folder() -> None:
    for name, path in modules().items():
        if path.name == "__init__.py":
            continue
        for target, line in imported(tree(path)):
            assert target != name.rpartition(".")[0], f"{path}:{line} imports its own face"


def test_folders_are_small_and_have_a_map() -> None:
    for folder in sorted({path.parent for path in modules().values()}):
        name = str(folder.relative_to(ROOT))
        files = list(folder.glob("*.py"))
        assert len(files) <= LARGEST or name in ROOMY, f"{name} has {len(files)} files"
        face = folder / "__init__.py"
        assert face.is_file(), f"{name} has no __init__.py"
        words = ast.get_docstring(tree(face)) or ""
        for path in files:
            if path.stem.startswith("__"):
                continue
            assert re.search(rf"\b{path.stem}\b", words), (
                f"the map in {face.relative_to(ROOT)} lacks {path.name}"
            )


def test_the_ground_stands_on_numpy_alone() -> None:
    for name, path in modules().items():
        if inside(name, *GROUND):
            for target, line in imported(tree(path)):
                top = target.split(".")[0]
                known = top in sys.stdlib_module_names or top in {"numpy", "ml_dtypes"}
                assert known or inside(target, *GROUND), f"{path}:{line} imports {target}"


def test_cli_imports_sideways_only_inside_command_bodies() -> None:
    for name, path in modules().items():
        if inside(name, SIDEWAYS):
            assert not at_load(tree(path)) & {"calib", "export"}, path


def test_runtime_never_imports_torch_or_onnx() -> None:
    for name, path in modules().items():
        if inside(name, "runtime"):
            for target, line in imported(tree(path)):
                assert target.split(".")[0] not in TORCH_WORLD | ONNX_WORLD, f"{path}:{line}"


def test_runtime_names_backends_only_inside_functions_or_backend_files() -> None:
    for name, path in modules().items():
        if inside(name, "runtime"):
            own = {each for folder, names in OWN.items() if inside(name, folder) for each in names}
            heavy = at_load(tree(path)) & HEAVY
            assert heavy <= own, f"{path} imports {heavy} while it loads"


def test_the_command_line_loads_nothing_heavy() -> None:
    for name, path in modules().items():
        if inside(name, SIDEWAYS):
            assert not at_load(tree(path)) & HEAVY, path


def test_no_face_loads_anything_heavy() -> None:
    for path in modules().values():
        if path.name == "__init__.py":
            heavy = at_load(tree(path)) & HEAVY
            assert not heavy, f"{path} imports {heavy} while it loads"


@pytest.mark.parametrize(
    "module",
    ["runtime", "d2m", "d2m.cli", "calib", "export", "d2m.recipe", "d2m.convert", "runtime.bundle"],
)
def test_importing_loads_no_heavy_module(module: str) -> None:
    heavy = sorted(HEAVY)
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_no_pickle_and_no_eval_in_the_runtime() -> None:
    for name, path in modules().items():
        if not inside(name, "runtime"):
            continue
        names = {target.split(".")[0] for target, _ in imported(tree(path))}
        assert not names & {"pickle", "dill", "joblib", "marshal", "shelve"}, path
        calls = {
            node.func.id
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile"}, path


def test_no_utils_modules() -> None:
    names = {path.name for path in modules().values()}
    assert not names & {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
