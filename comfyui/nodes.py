"""The nodes: a bundle is loaded once, LoRAs are added to it, and it makes images.

A number at its lowest value (steps 0, guidance -1, experts -1, ...) is the bundle's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .bundles import bundle_names, bundle_path, lora_names, lora_path, stamp
from .data import on_progress, to_images, to_masks, to_tensor

MODEL = "D2M_MODEL"
LARGEST_SEED = (1 << 53) - 1  # the largest whole number that a browser keeps exactly
LoRAs = tuple[tuple[Path, float, str], ...]  # file, strength, what changes when the file does


@dataclass
class Opened:
    """A pipeline, and the LoRAs that its weights hold now."""

    pipeline: Any
    loras: LoRAs = ()


@dataclass(frozen=True)
class Model:
    """What a wire of type D2M_MODEL carries: wires of one bundle share its weights."""

    opened: Opened
    loras: LoRAs = ()

    def pipeline(self) -> Any:
        """The pipeline with this wire's LoRAs, which are added where they are not yet."""
        if self.loras != self.opened.loras:
            self.opened.loras = ()  # whatever happens now, they are not those
            self.opened.pipeline.set_loras({path: by for path, by, _ in self.loras})
            self.opened.loras = self.loras
        return self.opened.pipeline


class LoadBundle:
    """A directory of models/d2m, opened on a backend."""

    CATEGORY = "d2m"
    FUNCTION = "load"
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "Opens a bundle (d2m export) of the folder models/d2m."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from runtime.program.backends import BACKENDS

        return {
            "required": {
                "bundle": (list(bundle_names()),),
                "backend": (["auto", *BACKENDS],),
                "offload": (["none", "block"], {"tooltip": "block: weights stay on the host."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, bundle: str, **_: Any) -> str:
        """A bundle that was exported anew is loaded anew."""
        path = bundle_path(bundle)
        return "" if path is None else stamp(path / "manifest.json")

    def load(self, bundle: str, backend: str, offload: str) -> tuple[Model]:
        import runtime

        streamed = None if offload == "none" else offload
        return (Model(Opened(runtime.load(bundle_path(bundle), backend, offload=streamed))),)


class AddLoRA:
    """A LoRA of the dense model, added to the weights while images are made."""

    CATEGORY = "d2m"
    FUNCTION = "add"
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "Adds a LoRA of models/loras, made for the dense model; may be chained."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.05}
        return {
            "required": {
                "model": (MODEL,),
                "lora": (lora_names(),),
                "strength": ("FLOAT", strength),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, **_: Any) -> str:
        """A file that was written anew is read anew."""
        return stamp(lora_path(lora))

    def add(self, model: Model, lora: str, strength: float) -> tuple[Model]:
        path = lora_path(lora)
        others = tuple(row for row in model.loras if row[0] != path)
        return (replace(model, loras=(*others, (path, float(strength), stamp(path)))),)


class Generate:
    """Images of a prompt."""

    CATEGORY = "d2m"
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE",)
    DESCRIPTION = "Images of a prompt; image i has seed + i."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 0, "min": 0, "max": 16384, "step": 8, "tooltip": "0: the bundle's own."}
        count = {"default": 1, "min": 1, "max": 64}
        return with_knobs(width=("INT", side), height=("INT", side), batch_size=("INT", count))

    def generate(
        self, model: Model, prompt: str, batch_size: int, width: int, height: int, **knobs: Any
    ) -> tuple[Any]:
        size: dict[str, Any] = {"width": width or None, "height": height or None}
        return (call(model, [prompt] * batch_size, **size, **knobs),)


class ImageToImage:
    """Images made from other images."""

    CATEGORY = "d2m"
    FUNCTION = "change"
    RETURN_TYPES = ("IMAGE",)
    DESCRIPTION = "Begins with an image; the higher the strength the less of it stays."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return with_knobs(image=("IMAGE",), strength=("FLOAT", strength_of(0.6)))

    def change(
        self, model: Model, prompt: str, image: Any, strength: float, **knobs: Any
    ) -> tuple[Any]:
        images = to_images(image)
        prompts = [prompt] * len(images)
        return (call(model, prompts, image=images, strength=strength, **knobs),)


class Edit:
    """Images that a prompt makes of others."""

    CATEGORY = "d2m"
    FUNCTION = "edit"
    RETURN_TYPES = ("IMAGE",)
    DESCRIPTION = "For models that see references: FLUX.1 Kontext one, FLUX.2 several."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        count = {"default": 1, "min": 1, "max": 64}
        types = with_knobs(image=("IMAGE",), batch_size=("INT", count))
        more = {"image2": ("IMAGE",), "image3": ("IMAGE",)}
        return {**types, "optional": {**more, **types["optional"]}}

    def edit(
        self,
        model: Model,
        prompt: str,
        image: Any,
        batch_size: int,
        image2: Any = None,
        image3: Any = None,
        **knobs: Any,
    ) -> tuple[Any]:
        given = [each for each in (image, image2, image3) if each is not None]
        seen = [one for each in given for one in to_images(each)]
        return (call(model, [prompt] * batch_size, references=seen, **knobs),)


class Inpaint:
    """Images of which a part is made anew."""

    CATEGORY = "d2m"
    FUNCTION = "inpaint"
    RETURN_TYPES = ("IMAGE",)
    DESCRIPTION = "Repaints what is white in the mask and keeps the rest of the image."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return with_knobs(image=("IMAGE",), mask=("MASK",), strength=("FLOAT", strength_of(1.0)))

    def inpaint(
        self, model: Model, prompt: str, image: Any, mask: Any, strength: float, **knobs: Any
    ) -> tuple[Any]:
        images = to_images(image)
        masks = to_masks(mask, len(images))
        prompts = [prompt] * len(images)
        return (call(model, prompts, image=images, mask=masks, strength=strength, **knobs),)


def with_knobs(**inputs: tuple[Any, ...]) -> dict[str, Any]:
    """INPUT_TYPES of a node that makes images: a model and a prompt, `inputs`, and knobs."""
    text = {"multiline": True, "default": ""}
    own = "the bundle's own"
    return {
        "required": {
            "model": (MODEL,),
            "prompt": ("STRING", text),
            **inputs,
            "seed": (
                "INT",
                {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True},
            ),
            "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": f"0: {own}."}),
            "guidance": (
                "FLOAT",
                {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1, "tooltip": f"-1: {own}."},
            ),
        },
        "optional": {
            "negative": ("STRING", {**text, "tooltip": "Of families with such a guidance."}),
            "top_k": (
                "INT",
                {"default": -1, "min": -1, "max": 64, "tooltip": f"Experts a token; -1: {own}."},
            ),
            "kappa": (
                "INT",
                {"default": 0, "min": 0, "max": 64, "tooltip": f"Blocks a group; 0: {own}."},
            ),
            "cache": ("STRING", {"default": "none", "tooltip": "Such as first-block:0.1."}),
        },
    }


def strength_of(default: float) -> dict[str, Any]:
    """The widget of a strength."""
    return {"default": default, "min": 0.05, "max": 1.0, "step": 0.05}


def call(
    model: Model,
    prompts: list[str],
    *,
    seed: int,
    steps: int,
    guidance: float,
    negative: str = "",
    top_k: int = -1,
    kappa: int = 0,
    cache: str = "none",
    **images: Any,
) -> Any:
    """IMAGE with one image a prompt, the i-th of seed + i."""
    made = model.pipeline()(
        prompts,
        seed=[seed + i for i in range(len(prompts))],
        steps=steps or None,
        guidance=None if guidance < 0 else guidance,
        negative=negative or None,
        top_k=None if top_k < 0 else top_k,
        kappa=kappa or None,
        cache=cache,
        progress=on_progress(),
        output_type="np",
        **images,
    )
    return to_tensor(made)


NODE_CLASS_MAPPINGS = {
    "D2MLoadBundle": LoadBundle,
    "D2MAddLoRA": AddLoRA,
    "D2MGenerate": Generate,
    "D2MImageToImage": ImageToImage,
    "D2MInpaint": Inpaint,
    "D2MEdit": Edit,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "D2MLoadBundle": "Load bundle (d2m)",
    "D2MAddLoRA": "Add LoRA (d2m)",
    "D2MGenerate": "Generate (d2m)",
    "D2MImageToImage": "Image to image (d2m)",
    "D2MInpaint": "Inpaint (d2m)",
    "D2MEdit": "Edit (d2m)",
}
