"""The arguments of a call, checked once: what comes out can be generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from runtime.bundle.block_groups import largest_kappa
from runtime.control.controlnet import ControlNet
from runtime.control.given import Control, control_size, fit_controls, read_controls
from runtime.families import family_of, is_guided
from runtime.files.checked_json import is_number, is_whole, show
from runtime.images.given import NOTHING, GivenImages, check_images
from runtime.program.step_cache import Method, check_method, read_method

MAX_STEPS = 1000
MAX_IMAGES = 10_000  # of one call
MAX_PROMPT = 100_000  # characters; tokenizers take time in proportion

# Arguments of diffusers' pipelines -> what to pass here.
DIFFUSERS_NAMES = {
    "num_inference_steps": "steps=",
    "guidance_scale": "guidance=",
    "true_cfg_scale": "guidance=",
    "negative_prompt": "negative=",
    "num_images_per_prompt": "n=",
    "generator": "seed=, a number (or latents=, the noise itself)",
    "callback_on_step_end": "callback=",
    "control_image": "control=",
    "controlnet_conditioning_scale": "control_scale=",
    "control_guidance_start": "control_range=",
    "control_guidance_end": "control_range=",
}


@dataclass(frozen=True)
class Request:
    """One entry of `prompts` and `seeds` per image; of `top_k` and `kappa` per step."""

    prompts: list[str]
    seeds: list[int | None]  # None: generated from latents that were given
    top_k: list[int | None]
    kappa: list[int | None]  # None: the bundle has no groups of blocks
    guidance: float
    height: int
    width: int
    latent_size: tuple[int, int]
    many: bool  # whether the answer is a list
    sigmas: tuple[float, ...] | None = None  # noise levels in place of the scheduler's own
    negative: list[str] | None = None  # negative prompt per image; None: no guidance by one
    cache: Method = Method()  # of steps
    images: GivenImages = NOTHING  # that it starts from or follows
    controls: tuple[Control, ...] = ()  # images that ControlNets follow

    def settings(self, index: int) -> dict[str, Any]:
        """What the text chunk of image `index` says: enough to generate it again."""
        settings = {
            "prompt": self.prompts[index],
            "seed": self.seeds[index],
            "steps": len(self.top_k),
            "guidance": self.guidance,
            "height": self.height,
            "width": self.width,
            "top_k": one_or_list(self.top_k),
        }
        if self.kappa[0] is not None:
            settings["kappa"] = one_or_list(self.kappa)
        if self.sigmas is not None:
            settings["sigmas"] = list(self.sigmas)
        if self.negative and self.negative[index]:
            settings["negative"] = self.negative[index]
        if self.cache.text != "none":
            settings["cache"] = self.cache.text
        if self.controls:
            settings["controlnets"] = [control.settings(index) for control in self.controls]
        return settings | self.images.settings(index)


def check_request(
    manifest: dict[str, Any],
    prompt: str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    n: int = 1,
    top_k: int | Sequence[int] | None = None,
    kappa: int | Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    negative: str | Sequence[str] | None = None,
    cache: str | None = None,
    image: Any = None,
    mask: Any = None,
    control: Any = None,
    strength: float | None = None,
    references: Any = None,
    controlnets: Sequence[ControlNet] = (),
    control_scale: Any = None,
    control_range: Any = None,
    control_mode: Any = None,
) -> Request:
    """Fill in the bundle's defaults; ValueError, one sentence, for what cannot be generated."""
    defaults = manifest["defaults"]
    prompts = check_prompts(prompt)
    n = whole_number(n, "n", 1, MAX_IMAGES // len(prompts))
    levels = check_sigmas(manifest, sigmas)
    default = defaults["steps"] if levels is None else len(levels)
    steps = whole_number(default if steps is None else steps, "steps", 1, MAX_STEPS)
    if levels is not None and len(levels) != steps:
        raise ValueError(
            f"sigmas lists {len(levels)} noise levels but steps is {steps}, expected as many;"
            " leave steps out."
        )
    height, width = (
        None if size is None else check_side(manifest, name, size)
        for name, size in (("height", height), ("width", width))
    )
    knobs = control_scale, control_range, control_mode
    controls = read_controls(controlnets, control, knobs, len(prompts), manifest)
    given: Any = {"image": image, "mask": mask, "strength": strength}
    given |= {"control": None if controlnets else control, "references": references}
    if controls and references is not None:
        raise ValueError(
            "references are given with a ControlNet's image, expected one of them: ControlNets know"
            " no image tokens but the noise's; leave one out."
        )
    images, height, width = check_images(manifest, len(prompts), n, height, width, **given)
    height, width = control_size(manifest, controls, height, width)
    height, width = check_side(manifest, "height", height), check_side(manifest, "width", width)
    taken = steps - images.first_step(steps)
    guidance = defaults["guidance"] if guidance is None else guidance
    if not is_number(guidance) or not 0 <= guidance <= 1000:
        raise ValueError(f"guidance is {guidance!r}, expected a number from 0 to 1000.")
    scale = manifest["latents"]["vae_scale_factor"]
    seeds = check_seeds(seed, len(prompts), n)
    return Request(
        prompts=[text for text in prompts for _ in range(n)],
        seeds=[start + i for start in seeds for i in range(n)],
        top_k=check_top_k(manifest, top_k, steps),
        kappa=check_kappa(manifest, kappa, steps),
        guidance=float(guidance),
        height=height,
        width=width,
        latent_size=(height // scale, width // scale),
        many=not isinstance(prompt, str) or n > 1,
        sigmas=levels,
        negative=check_negative(manifest, negative, len(prompts), n, float(guidance)),
        cache=check_cache(manifest, cache, taken),
        images=images,
        controls=fit_controls(controls, len(prompts), n, height, width),
    )


def refuse_other(arguments: Iterable[str]) -> NoReturn:
    """TypeError for arguments that a call does not have, with ours for those of diffusers."""
    name = next((name for name in arguments if name in DIFFUSERS_NAMES), next(iter(arguments)))
    if name in DIFFUSERS_NAMES:
        raise TypeError(f"{name} is diffusers' name, expected {DIFFUSERS_NAMES[name]}.")
    raise TypeError(f"{name} is no argument of a pipeline; see help(runtime.run).")


def with_knobs(
    manifest: dict[str, Any], request: Request, *, steps: int, top_k: Any, kappa: Any
) -> Request:
    """A checked request with other steps, top_k and kappa, of which these alone are checked."""
    steps = whole_number(steps, "steps", 1, MAX_STEPS)
    top_k, kappa = check_top_k(manifest, top_k, steps), check_kappa(manifest, kappa, steps)
    return replace(request, top_k=top_k, kappa=kappa)


def check_prompts(prompt: Any) -> list[str]:
    """One or more texts."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(
            f"the prompt is {type(prompt).__name__} {show(prompt)}, expected a text or a list"
            " of at least one text."
        )
    if len(prompts) > MAX_IMAGES:
        raise ValueError(f"there are {len(prompts)} prompts, expected at most {MAX_IMAGES}.")
    for text in prompts:
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"a prompt is {kind} {show(text)}, expected a text (str).")
        if len(text) > MAX_PROMPT:
            raise ValueError(
                f"a prompt has {len(text)} characters, expected at most {MAX_PROMPT}; shorten it."
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"the prompt {show(text)} holds half a surrogate pair, expected valid Unicode."
            ) from None
    return list(prompts)


def check_negative(
    manifest: dict[str, Any], negative: Any, prompts: int, n: int, guidance: float
) -> list[str] | None:
    """A negative prompt per image; None without classifier-free guidance."""
    if not is_guided(manifest):
        if negative is None:
            return None
        raise ValueError(
            f"negative is {show(negative)}, expected none: this bundle does not generate"
            " with classifier-free guidance; leave it out."
        )
    texts = [negative or ""] if negative is None or isinstance(negative, str) else negative
    texts = check_prompts(texts)
    if len(texts) not in (1, prompts):
        raise ValueError(
            f"there are {len(texts)} negative prompts for {prompts} prompts, expected one, or one"
            " per prompt."
        )
    if guidance <= 1:
        return None
    each = texts * prompts if len(texts) == 1 else texts
    return [text for text in each for _ in range(n)]


def check_seeds(seed: Any, prompts: int, n: int) -> list[int]:
    """The first seed of every prompt."""
    seeds = seed if isinstance(seed, list | tuple | np.ndarray) else [seed] * prompts
    if len(seeds) != prompts:
        raise ValueError(
            f"there are {len(seeds)} seeds for {prompts} prompts, expected one seed, or one per"
            " prompt."
        )
    return [whole_number(value, "seed", 0, 2**63 - 1 - n) for value in seeds]


def check_top_k(manifest: dict[str, Any], top_k: Any, steps: int) -> list[int | None]:
    """Experts per token for every step."""
    choices = manifest.get("top_k_choices") or []
    if top_k is None:
        return [manifest.get("top_k")] * steps
    if not choices:
        raise ValueError(
            f"top_k is {show(top_k)}, expected none: this bundle holds a dense model, which has"
            " no experts."
        )
    values = per_step("top_k", top_k, steps)
    for k in values:
        if not is_whole(k) or k not in choices:
            known = ", ".join(map(str, sorted(choices)))
            raise ValueError(
                f"top_k is {show(k)}, expected one of {known}, which this bundle was exported"
                " with; export again with --top-k to have others."
            )
    return [int(k) for k in values]


def check_sigmas(manifest: dict[str, Any], sigmas: Any) -> tuple[float, ...] | None:
    """Noise levels that decrease from at most 1 and stay above 0, before the scheduler's shift."""
    if sigmas is None:
        return None
    values = sigmas.tolist() if isinstance(sigmas, np.ndarray) else sigmas
    what = "decreasing numbers, at most 1 and above 0, such as [1, 0.7, 0.3]"
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_STEPS:
        raise ValueError(f"sigmas is {show(sigmas)}, expected a list of 1 to {MAX_STEPS} {what}.")
    for value, before in zip(values, (None, *values)):
        if not is_number(value) or not 0 < value <= 1:
            raise ValueError(f"sigmas holds {show(value)}, expected {what}.")
        if before is not None and not value < before:
            raise ValueError(f"sigmas holds {value} after {before}, expected {what}.")
    if manifest["scheduler"].get("use_flow_sigmas"):
        raise ValueError(
            "sigmas are given but the scheduler has use_flow_sigmas set, which makes its own,"
            " expected none; leave them out."
        )
    return tuple(map(float, values))


def check_kappa(manifest: dict[str, Any], kappa: Any, steps: int) -> list[int | None]:
    """Blocks that a group keeps, for every step; None where there are no groups."""
    default = manifest.get("kappa")
    if kappa is None:
        return [default] * steps
    if default is None:
        raise ValueError(
            f"kappa is {show(kappa)}, expected none: this bundle's blocks are in no groups, all of"
            " them run."
        )
    most = min(largest_kappa(row) for row in manifest["components"].values() if row.get("groups"))
    return [whole_number(value, "kappa", 1, most) for value in per_step("kappa", kappa, steps)]


def check_cache(manifest: dict[str, Any], cache: Any, steps: int) -> Method:
    """How steps are cached (runtime.program.step_cache)."""
    method = read_method(cache, steps)
    if method.skips:
        check_method(method, manifest["components"]["transformer"])
    return method


def per_step(name: str, value: Any, steps: int) -> list[Any]:
    """One value for every step, or a list that has as many."""
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value] * steps
    if len(values) != steps:
        raise ValueError(
            f"{name} lists {len(values)} numbers for {steps} steps, expected one number, or one"
            " per step."
        )
    return values


def one_or_list(values: list[Any]) -> Any:
    """The value that all of a list are, or the list."""
    return values[0] if len(set(values)) == 1 else list(values)


def read_latents(latents: Any, request: Request, manifest: dict[str, Any]) -> np.ndarray:
    """Initial noise as float32 latents of the family's own shape; other layouts are arranged."""
    images, family = len(request.prompts), family_of(manifest)
    known = family.layouts(images, manifest["latents"]["channels"], *request.latent_size)
    if not isinstance(latents, np.ndarray) or not np.issubdtype(latents.dtype, np.floating):
        kind = getattr(latents, "dtype", type(latents).__name__)
        raise ValueError(f"latents is {kind}, expected a numpy array of floats.")
    if latents.shape not in known:
        raise ValueError(
            f"latents has shape {list(latents.shape)}, expected"
            f" {' or '.join(str(list(shape)) for shape in known)} for {images} images of"
            f" {request.width} x {request.height}."
        )
    if not np.isfinite(latents).all():
        raise ValueError("latents holds NaN or infinity, expected finite numbers.")
    values = latents.astype(np.float32)
    return values if latents.shape == known[0] else family.arrange(values)


def whole_number(value: Any, name: str, low: int, high: int) -> int:
    """`value` where it is a whole number from low to high; ValueError, one sentence."""
    if not is_whole(value) or not low <= value <= high:
        raise ValueError(f"{name} is {show(value)}, expected a whole number from {low} to {high}.")
    return int(value)


def check_side(manifest: dict[str, Any], name: str, value: Any) -> int:
    """Height or width in pixels; None: the bundle's own."""
    value = manifest["defaults"][name] if value is None else value
    factor = manifest["latents"]["vae_scale_factor"] * manifest["latents"]["patch"]
    largest = family_of(manifest).largest(manifest)
    in_range = is_whole(value) and factor <= value <= largest
    if not in_range or value % factor:
        near = f"; {value // factor * factor} is the nearest below" if in_range else ""
        raise ValueError(
            f"{name} is {show(value)}, expected a multiple of {factor} from {factor} to"
            f" {largest}{near}."
        )
    return int(value)
