"""ComfyUI's part towards a node pack, by its published interface: it loads the folder, checks a
workflow's values against INPUT_TYPES and runs the nodes in the order of their links."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BYPASSED = 4  # a node's mode: what comes in of a type leaves as that type


class Interrupted(Exception):
    """Cancel was pressed."""


class Bars:
    """The progress bars that nodes made, and Cancel."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int]] = []
        self.cancel = False

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.cancel:
            raise Interrupted


@contextmanager
def comfyui(models: Path) -> Iterator[Bars]:
    """ComfyUI's modules, with `models` as its folder models/."""
    bars = Bars()

    class ProgressBar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int | None = None) -> None:
            bars.shown.append((value, total or self.total))

    folders: dict[str, list[str]] = {"loras": [str(models / "loras")]}

    def add_model_folder_path(name: str, path: str, is_default: bool = False) -> None:
        if path not in folders.setdefault(name, []):
            folders[name].append(path)

    def get_filename_list(name: str) -> list[str]:
        return [path.name for folder in folders[name] for path in Path(folder).glob("*")]

    def get_full_path(name: str, file: str) -> str | None:
        found = (Path(folder, file) for folder in folders[name])
        return next((str(path) for path in found if path.is_file()), None)

    modules = {
        "folder_paths": {
            "models_dir": str(models),
            "add_model_folder_path": add_model_folder_path,
            "get_folder_paths": lambda name: list(folders[name]),
            "get_filename_list": get_filename_list,
            "get_full_path": get_full_path,
        },
        "comfy": {"__path__": []},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": (
                bars.throw_exception_if_processing_interrupted
            )
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, values in modules.items():
            module = ModuleType(name)
            vars(module).update(values)
            patch.setitem(sys.modules, name, module)
        yield bars


def load_pack(folder: Path) -> ModuleType:
    """A folder of custom_nodes as ComfyUI loads it: a package named by its path."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check_node(node: type) -> None:
    """What ComfyUI reads of a class before it shows or runs it."""
    made: Any = node
    inputs = made.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional", "hidden"} and inputs["required"]
    json.dumps(inputs)  # /object_info sends it to the browser
    assert isinstance(made.RETURN_TYPES, tuple) and all(map(str.isupper, made.RETURN_TYPES))
    names = getattr(made, "RETURN_NAMES", made.RETURN_TYPES)
    assert len(names) == len(made.RETURN_TYPES)
    assert callable(getattr(made, made.FUNCTION)) and made.CATEGORY


def run_workflow(
    workflow: dict[str, Any], nodes: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> dict[int, tuple[Any, ...]]:
    """What every node returned. change(inputs): of every node before it runs, by their names."""
    links = {row[0]: (row[1], row[2], row[5]) for row in workflow["links"]}
    rows = {row["id"]: row for row in workflow["nodes"]}
    done: dict[int, tuple[Any, ...]] = {}

    def outputs(number: int) -> tuple[Any, ...]:
        if number not in done:
            row = rows[number]
            slots = [each for each in row["inputs"] if "widget" not in each]
            linked = {each["name"]: links[each["link"]] for each in slots}
            for each in slots:
                assert links[each["link"]][2] == each["type"]
            given = {name: outputs(origin)[slot] for name, (origin, slot, _) in linked.items()}
            if row["mode"] == BYPASSED:
                types = {each["type"]: given[each["name"]] for each in slots}
                done[number] = tuple(types[each["type"]] for each in row["outputs"])
            else:
                node = nodes[row["type"]]
                given |= widgets(node, row["widgets_values"], set(given))
                change(given)
                check_inputs(node, given)
                done[number] = getattr(node(), node.FUNCTION)(**given)
                assert len(done[number]) == len(node.RETURN_TYPES) == len(row["outputs"])
        return done[number]

    for number in rows:
        outputs(number)
    return done


def prompt_of(workflow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A workflow as ComfyUI's page sends it to run: by node, values and [node, output] of links."""
    links = {row[0]: (row[1], row[2]) for row in workflow["links"]}
    rows = {row["id"]: row for row in workflow["nodes"]}

    def origin(link: int) -> list[Any]:
        number, slot = links[link]
        row = rows[number]
        if row["mode"] != BYPASSED:
            return [str(number), slot]
        kind = row["outputs"][slot]["type"]
        return origin(next(each["link"] for each in row["inputs"] if each["type"] == kind))

    found = {}
    for number, row in rows.items():
        if row["mode"] == BYPASSED:
            continue
        linked = {each["name"]: each["link"] for each in row["inputs"] if "widget" not in each}
        values = widgets(nodes[row["type"]], row["widgets_values"], set(linked))
        inputs = values | {name: origin(link) for name, link in linked.items()}
        found[str(number)] = {"class_type": row["type"], "inputs": inputs}
    return found


def object_info(nodes: dict[str, Any], titles: dict[str, str]) -> dict[str, Any]:
    """What /object_info tells ComfyUI's page of the nodes."""
    return {
        name: {
            "input": (types := node.INPUT_TYPES()),
            "input_order": {side: list(names) for side, names in types.items()},
            "output": list(node.RETURN_TYPES),
            "output_is_list": [False] * len(node.RETURN_TYPES),
            "output_name": list(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)),
            "name": name,
            "display_name": titles.get(name, name),
            "description": getattr(node, "DESCRIPTION", ""),
            "python_module": "custom_nodes.d2m",
            "category": node.CATEGORY,
            "output_node": getattr(node, "OUTPUT_NODE", False),
        }
        for name, node in nodes.items()
    }


class LoadImage:
    """ComfyUI's own, here of random pixels and a mask of their right half."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE", "MASK"), "load", "image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (["example.png"], {"image_upload": True})}}

    def load(self, image: str) -> tuple[Any, Any]:
        import torch

        pixels = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(5))
        mask = torch.zeros(1, 32, 32)
        mask[:, :, 16:] = 1.0
        return pixels, mask


class PreviewImage:
    """ComfyUI's own: the end of a workflow."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "show", "image", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}}

    def show(self, images: Any) -> tuple[()]:
        assert str(images.dtype) == "torch.float32"
        assert images.ndim == 4 and images.shape[-1] == 3
        assert float(images.min()) >= 0 and float(images.max()) <= 1
        return ()


CORE = {"LoadImage": LoadImage, "PreviewImage": PreviewImage}


def inputs_of(node: Any) -> dict[str, Any]:
    """Name -> (type, options) of all inputs, in the order of their widgets."""
    types = node.INPUT_TYPES()
    found = {**types["required"], **types.get("optional", {})}
    return {name: (row[0], row[1] if len(row) > 1 else {}) for name, row in found.items()}


def widgets(node: Any, values: list[Any], linked: set[str]) -> dict[str, Any]:
    """A node's own values by their names; a seed's is followed by what comes after it."""
    left, found = list(values), {}
    for name, (kind, options) in inputs_of(node).items():
        if name in linked or not (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING")):
            continue
        found[name] = left.pop(0)
        if options.get("control_after_generate") or options.get("image_upload"):
            left.pop(0)
    assert not left, f"{node} has fewer widgets than values"
    return found


def check_inputs(node: Any, given: dict[str, Any]) -> None:
    """As ComfyUI checks a prompt: nothing is missing, choices are known, numbers are in range."""
    assert set(node.INPUT_TYPES()["required"]) <= set(given)
    for name, value in given.items():
        kind, options = inputs_of(node)[name]
        if isinstance(kind, list):
            assert value in kind, f"{name} is {value!r}, which is none of {kind}"
        elif kind in ("INT", "FLOAT"):
            assert isinstance(value, int if kind == "INT" else int | float)
            assert options["min"] <= value <= options["max"], f"{name} is {value}"
        elif kind == "STRING":
            assert isinstance(value, str)
