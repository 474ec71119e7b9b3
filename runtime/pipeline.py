"""A bundle as a callable: prompts in, images out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtime.image import to_array, to_image
from runtime.opened import Opened
from runtime.request import Request, check_request, read_latents, refuse_other, with_knobs
from runtime.sampling import Cancel, Progress, StepCallback, generate_batch

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT_TYPES = ("pil", "np")


class Pipeline(Opened):
    """An opened bundle that is called to generate images; for its arguments see Opened.

    In a `with` statement its memory is given back at the end (`close`).
    """

    def __call__(
        self,
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
        budget: float | None = None,
        latents: np.ndarray | None = None,
        negative: str | Sequence[str] | None = None,
        cache: str | None = None,
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        control: Any = None,
        references: Any = None,
        control_scale: float | Sequence[float] | None = None,
        control_range: Any = None,
        control_mode: int | Sequence[int] | None = None,
        progress: Progress | None = None,
        callback: StepCallback | None = None,
        cancel: Cancel | None = None,
        output_type: str = "pil",
        **other: Any,
    ) -> Image | list[Image] | np.ndarray:
        """Generate one image, or a list of them where n > 1 or `prompt` is a list.

        prompt   a text, or a list of them; `n` images are generated of each
        seed     of the first image; image i of a prompt has seed + i. With a list of prompts,
                 a list of seeds (one per prompt) or one seed that all of them start from
        steps    1 to 1000; guidance: a number from 0; height, width: pixels
        top_k    experts per token: a number the bundle was exported with, or one per step
        kappa    blocks that every group keeps: 1 to the smallest group's size, or one per step
        sigmas   noise levels of the steps before the scheduler's shift, falling from at most 1
        budget   seconds that the call may take: those of steps, top_k and kappa that are left out
                 are picked from what was measured here (runtime.latency_budget; d2m measure)
        latents  initial noise instead of a seed's: [images, C, h, w] or, of families that pack,
                 [images, tokens, channels]
        negative negative prompt: a text, or one per prompt; for families that use
                 classifier-free guidance
        cache    in which steps the blocks are not run: "none" (the default), "auto",
                 "first-block:0.1", "interval:2", "taylor:interval:3"; see
                 runtime.program.step_cache. Images say how many were skipped
        image    what is changed (image to image): a PIL image or an array [H, W, 3], of uint8 or of
                 floats 0 to 1; or a list, one per prompt. height and width left out are its own,
                 made smaller to what the model takes
        strength how much of the denoising it goes through, above 0 and at most 1; 0.6 unless said,
                 with a mask 1
        mask     where the image is repainted: white (255, 1.0) of a PIL image or an array [H, W] of
                 the image's size; or a list, one per prompt
        references images that the model sees beside the noise (FLUX.1 Kontext one, FLUX.2 several),
                 as `image`, the same for every prompt; height and width left out are the first's
        control  for models that follow one, such as edges or depth: an image, as `image`. With
                 ControlNets: a list of one for each of them (None leaves it out), or of a union's
                 as many as there are kinds in `control_mode`
        control_scale how strongly a ControlNet's image is followed, 1 unless said; or a list
        control_range in which share of the steps: (0, 0.6) are the first 60 %; or a list of them
        control_mode of a union: which kind of image it is, a whole number; or a list
        progress called as progress(phase, done, total)
        callback called after every step of a batch as callback(done, steps, latents), latents
                 [images of the batch, ...] as the family denoises them, not to be changed
        cancel   an Event, or what is called before every step; set or True, it raises Cancelled
        output_type "pil", or "np" for an array [images, H, W, 3], float32, 0 to 1

        Arguments left out come from the bundle. Raises ValueError with one sentence, TypeError
        for an argument of another name, which says ours where it is one of diffusers'.
        """
        if other:
            refuse_other(other)
        request = check_request(
            self.manifest,
            prompt,
            seed=seed,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            n=n,
            top_k=top_k,
            kappa=kappa,
            sigmas=sigmas,
            negative=negative,
            cache=cache,
            image=image,
            mask=mask,
            control=control,
            strength=strength,
            references=references,
            controlnets=self.controlnets,
            control_scale=control_scale,
            control_range=control_range,
            control_mode=control_mode,
        )
        if output_type not in OUTPUT_TYPES:
            expected = ", ".join(OUTPUT_TYPES)
            raise ValueError(f"output_type is {output_type!r}, expected one of {expected}.")
        # Everything is checked before the first image: a call of many fails at once or not at all.
        if budget is not None:
            given = {"steps": steps, "top_k": top_k, "kappa": kappa}
            request = with_knobs(self.manifest, request, **self.pick_knobs(request, budget, given))
        noise = None
        if latents is not None:
            noise = read_latents(latents, request, self.manifest)
            request = replace(request, seeds=[None] * len(request.seeds))
        images: list[Any] = []
        for start in range(0, len(request.prompts), self.max_batch):
            part = slice(start, start + self.max_batch)
            start_noise = None if noise is None else noise[part]
            pixels, settings = generate_batch(
                self, request, part, start_noise, progress, callback, cancel
            )
            if output_type == "np":
                images += map(to_array, pixels)
            else:
                images += map(to_image, pixels, settings)
        if output_type == "np":
            return np.stack(images)
        return images if request.many else images[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce__(self) -> Any:
        raise TypeError(
            "a pipeline cannot be pickled, since its executors hold this process's "
            f"memory; call runtime.load({str(self.bundle.path)!r}) in every process."
        )

    def pick_knobs(
        self, request: Request, budget: float, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """steps, top_k and kappa for a request within `budget` seconds (runtime.latency_budget)."""
        from runtime.latency_budget import pick_knobs, table_key

        key = table_key(self.setting(), request.height, request.width, len(request.prompts))
        return pick_knobs(key, self.bundle.path, request, budget, given)
