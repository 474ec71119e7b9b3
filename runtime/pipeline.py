"""A bundle as a callable: prompts in, images out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.arguments import Request, check_request, read_latents
from runtime.bundle import Bundle, open_bundle, required_key
from runtime.executor import (
    GPU_BACKENDS,
    PLAN_BACKENDS,
    Executor,
    batch_limit,
    choose,
    open_component,
)
from runtime.experts import check_experts
from runtime.families import family_of
from runtime.family import Arrays, rows
from runtime.forecast import forecast
from runtime.groups import known_beforehand
from runtime.offload import check_offload
from runtime.text import TextTokenizer
from runtime.weights import to_dtype, to_float32

if TYPE_CHECKING:
    from PIL.Image import Image

    from runtime.groups import Starts

log = logging.getLogger("runtime")
Progress = Callable[[str, int, int], None]
AfterStep = Callable[[int, int, np.ndarray], None]
Witness = Callable[[Mapping[str, np.ndarray], int | None, int | None], None]
VERIFY = ("cached", "full")


class Cancelled(Exception):
    """A drawing that was given up because its `cancel` said so."""


def default_bundle() -> Path:
    """The bundle that ships with the package."""
    return Path(__file__).parent / "default"


def check_of(verify: str) -> str:
    """What `open_bundle` checks: hashes always, for an image is drawn."""
    if verify not in VERIFY:
        raise ValueError(f"--verify is {verify!r}, expected one of {', '.join(VERIFY)}.")
    return verify


class Pipeline:
    """A bundle opened on a backend; call it to draw.

    Components are opened when first needed. `mode` ("graph" or "blocks") is ONNX Runtime's
    alone, see runtime.ort; `experts` ("auto", "plans" or "cubins") that of plans, see
    runtime.experts. `verify` "full" computes every file's hash anew; `key` is a public key's file
    by which the bundle must be signed (None: D2M_PUBLIC_KEY of the environment, if set). The same
    seed, bundle, backend and batch give the same bytes; another batch size may round sums
    differently, and so change an image's last bits. A batch of fewer rows than
    `min_batch` is filled up with copies of its last one, which are thrown away; 1 and more say
    that from so many rows on nothing changes (runtime.serve.batch_invariance). With `offload`
    "block" the transformer's weights are streamed block by block (see runtime.offload), and the
    other components are open only while they run.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        backend: str = "auto",
        *,
        threads: int | None = None,
        mode: str | None = None,
        experts: str = "auto",
        max_batch: int = 8,
        min_batch: int = 0,
        verify: str = "cached",
        key: str | os.PathLike[str] | None = None,
        offload: str | None = None,
    ) -> None:
        if isinstance(bundle, Bundle):
            opened = bundle
        else:
            key = required_key() if key is None else key
            opened = open_bundle(bundle or default_bundle(), check_of(verify), key)
        self.bundle = opened
        self.manifest: dict[str, Any] = opened.manifest
        self.family = family_of(self.manifest)
        self.family.check_scheduler(self.manifest["scheduler"])
        self.asked = backend
        self.offload = check_offload(offload)
        self.backend, reason = choose(opened, backend, self.offload)
        log.info("backend %s (%s)", self.backend, reason)
        check_experts(experts, self.backend)
        check_offload(self.offload, self.backend)
        self.threads, self.mode, self.experts = threads, mode, experts
        limit = batch_limit(opened, self.backend) // (1 + self.family.guided)  # rows an image
        self.max_batch = min(max_batch, max(1, limit))
        self.min_batch = min(min_batch, self.max_batch)
        self.witness: Witness | None = None  # told of every step's inputs, top_k and kappa
        self._executors: dict[str, Executor] = {}
        specs = self.manifest["tokenizers"]
        self._tokenizers = {
            name: TextTokenizer(name, opened.file(specs[name]["file"]), specs[name])
            for name in self.family.tokenizers
        }

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
        progress: Progress | None = None,
        callback: AfterStep | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> Image | list[Image]:
        """Draw: one image, or a list of them where n > 1 or `prompt` is a list.

        prompt   a text, or a list of them; every one is drawn `n` times
        seed     of the first image; image i of a prompt has seed + i. With a list of prompts,
                 a list of seeds (one per prompt) or one seed that all of them start from
        steps    1 to 1000; guidance: a number from 0; height, width: pixels
        top_k    experts per token: a number the bundle was exported with, or one per step
        kappa    blocks that every group keeps: 1 to the smallest group's size, or one per step
        sigmas   noise levels of the steps before the scheduler's shift, falling from at most 1
        budget   seconds that the call may take: those of steps, top_k and kappa that are left out
                 are picked from what was measured here (runtime.budget; d2m measure)
        latents  initial noise instead of a seed's: [images, C, h, w] or, of families that pack,
                 [images, tokens, channels]
        negative what not to draw: a text, or one per prompt; for families that are drawn with
                 classifier-free guidance
        progress called as progress(phase, done, total)
        callback called after every step of a batch as callback(done, steps, latents), latents
                 [images of the batch, ...] as the family denoises them, not to be changed
        cancel   asked before every step (an Event's is_set, say); True raises Cancelled

        Arguments left out come from the bundle. Raises ValueError with one sentence.
        """
        knobs: dict[str, Any] = {"steps": steps, "top_k": top_k, "kappa": kappa}
        rest: dict[str, Any] = {"seed": seed, "guidance": guidance, "n": n, "sigmas": sigmas}
        rest |= {"height": height, "width": width, "negative": negative}
        request = check_request(self.manifest, prompt, **knobs, **rest)
        if budget is not None:
            from runtime.budget import within

            knobs = within(self, request, budget, knobs)
            request = check_request(self.manifest, prompt, **knobs, **rest)
        noise = None
        if latents is not None:
            noise = read_latents(latents, request, self.manifest)
            request = replace(request, seeds=[None] * len(request.seeds))
        images: list[Image] = []
        for start in range(0, len(request.prompts), self.max_batch):
            part = slice(start, start + self.max_batch)
            given = None if noise is None else noise[part]
            images += self.draw(request, part, given, progress, cancel, callback)
        return images if request.many else images[0]

    def draw(
        self,
        request: Request,
        part: slice,
        noise: np.ndarray | None,
        progress: Progress | None = None,
        cancel: Callable[[], bool] | None = None,
        callback: AfterStep | None = None,
    ) -> list[Image]:
        """One batch of a checked request."""
        from runtime.picture import to_image

        def tell(phase: str, done: int, total: int) -> None:
            if cancel and cancel():
                raise Cancelled("the drawing was cancelled.")
            if progress:
                progress(phase, done, total)

        done, total = min(part.stop, len(request.prompts)), len(request.prompts)
        start, prompts = part.start, request.prompts[part]
        tell("encode", start, total)
        against = [] if request.negative is None else request.negative[part]
        different = list(dict.fromkeys([*prompts, *against]))
        # Two texts where there is a negative one, even where it is the same: one row alone takes
        # other routines, so an image would depend on the texts of others in its batch.
        least = max(self.min_batch, 2 if against else 1)
        spare = different[-1:] * (least - len(different))
        encoded = self.encode([*different, *spare])
        tell("encode", done, total)
        if noise is None:
            seeds = [seed for seed in request.seeds[part] if seed is not None]
            noise = self.noise(seeds, request.latent_size)
        count = max(len(prompts), self.min_batch)
        fill = np.minimum(np.arange(count), len(prompts) - 1)
        noise = noise[fill]

        def of(texts: Sequence[str]) -> dict[str, np.ndarray]:
            places = np.array([different.index(text) for text in texts])[fill]
            return {name: array[places] for name, array in encoded.items()}

        def step(index: int, steps: int) -> None:
            tell("denoise", start * steps + index * len(prompts), total * steps)

        def after(index: int, steps: int, latents: np.ndarray) -> None:
            if callback:
                callback(index, steps, latents[: len(prompts)])

        packed = self.denoise(
            noise,
            of(prompts),
            negative=of(against) if against else None,
            latent_size=request.latent_size,
            top_k=request.top_k,
            kappa=request.kappa,
            guidance=request.guidance,
            sigmas=request.sigmas,
            step=step,
            after=after,
        )
        tell("decode", start, total)
        pixels = self.decode(packed, request.latent_size)[: len(prompts)]
        tell("decode", done, total)
        model: dict[str, Any] = {
            "backend": self.backend,
            "name": self.bundle.name,
            "bundle": self.bundle.digest,
        }
        # Whoever sets min_batch has found that more rows change nothing, so it is what an image
        # depends on; without it the rows that were there are.
        model |= {"batch": self.min_batch or count}
        return [
            to_image(image, request.settings(start + i) | model) for i, image in enumerate(pixels)
        ]

    def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Prompts -> the transformer's conditions [n, ...] by name, float32."""

        def run(component: str, tokenizer: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
            worded = [self.family.worded(text) for text in texts]
            ids, mask = self._tokenizers[tokenizer].tokens(worded)
            found = self.execute(component, ids)
            return found | {"mask": mask} if self.family.masked else found

        return self.family.encode(run, prompts)

    def left_out(self, prompt: str) -> list[str]:
        """What the tokenizers leave out of a prompt that is too long for them, a clause each."""
        text = self.family.worded(prompt)
        return [clause for each in self._tokenizers.values() if (clause := each.left_out(text))]

    def noise(self, seeds: Sequence[int], latent_size: tuple[int, int]) -> np.ndarray:
        """Initial latents of the family's shape, one stream a seed."""
        return self.family.noise(seeds, self.manifest["latents"]["channels"], *latent_size)

    def levels(
        self, steps: int, latent_size: tuple[int, int], given: Sequence[float] | None = None
    ) -> np.ndarray:
        """The noise levels [steps + 1] of the bundle's scheduler, or those that follow `given`."""
        tokens = self.family.image_tokens(self.manifest["latents"], latent_size)
        return self.family.sigmas(self.manifest["scheduler"], steps, tokens, given)

    def denoise(
        self,
        noise: np.ndarray,
        conditions: Arrays,
        *,
        latent_size: tuple[int, int],
        top_k: Sequence[int | None],
        guidance: float,
        negative: Arrays | None = None,
        kappa: Sequence[int | None] | None = None,
        sigmas: Sequence[float] | None = None,
        step: Callable[[int, int], None] | None = None,
        after: AfterStep | None = None,
    ) -> np.ndarray:
        """Noise [n, ...] -> latents, one step of the family's sampler per entry of `top_k`.

        `conditions` as `encode` gives them, [n, ...]; `negative` the same of negative prompts, for
        classifier-free guidance (both run together, its rows first). `latent_size` is (h, w) in
        latent pixels; `kappa` has an entry per step, None throughout means the bundle's; `sigmas`
        see `__call__`; `step(done, steps)` is called before the first step and after each,
        `after(done, steps, latents)` after each.
        """
        steps = len(top_k)
        kept = [self.manifest.get("kappa")] * steps if kappa is None else kappa
        levels = self.levels(steps, latent_size, sigmas)
        advance = self.family.sampler(self.manifest["scheduler"], levels)
        if negative is not None:
            conditions = {
                name: np.concatenate([negative[name], array]) for name, array in conditions.items()
            }
        feeds = self.feeds(noise, conditions, levels[:-1], latent_size, guidance)
        executor, component = self.executor("transformer"), self.bundle.component("transformer")
        starts: list[Any] = [None] * steps
        if known_beforehand(component) and hasattr(executor, "block"):
            # Whole graphs have no `block`: their routers are in them.
            starts = list(forecast(component, executor.block, map(self.cast, feeds), kept))
        latents = noise
        for index, feed in enumerate(feeds):
            if step:
                step(index, steps)
            inputs = feed | {"hidden_states": self.hidden(latents, rows(conditions))}
            if self.witness:
                self.witness(inputs, top_k[index], kept[index])
            (sample,) = self.execute(
                "transformer", inputs, top_k[index], kept[index], starts[index]
            ).values()
            if negative is not None:
                sample = self.family.guide(sample, guidance)
            velocity = self.family.velocity(sample, self.manifest["latents"], latent_size)
            latents = advance(index, latents, velocity)
            if after:
                after(index + 1, steps, latents)
        if step:
            step(steps, steps)
        return latents

    def hidden(self, latents: np.ndarray, count: int) -> np.ndarray:
        """hidden_states [count, T, channels] of latents [n, ...], again for every n rows."""
        tokens = self.family.tokens(latents, self.manifest["latents"])
        return tokens if len(tokens) == count else np.tile(tokens, (count // len(tokens), 1, 1))

    def feeds(
        self,
        noise: np.ndarray,
        conditions: Arrays,
        sigmas: np.ndarray,
        latent_size: tuple[int, int],
        guidance: float,
    ) -> list[dict[str, np.ndarray]]:
        """The transformer's inputs for every step, all with the noise as hidden_states."""
        hidden = self.hidden(noise, rows(conditions))
        found = self.family.feeds(self.manifest, conditions, sigmas, latent_size, guidance)
        return [{"hidden_states": hidden, **feed} for feed in found]

    def decode(self, latents: np.ndarray, latent_size: tuple[int, int]) -> np.ndarray:
        """Latents -> pixels [n, 3, H, W], float32, about -1 to 1."""
        latents = self.family.image_latents(latents, self.manifest["latents"], latent_size)
        (pixels,) = self.execute("vae_decoder", latents).values()
        return pixels

    def execute(
        self,
        component: str,
        inputs: np.ndarray | dict[str, np.ndarray],
        top_k: int | None = None,
        kappa: int | None = None,
        starts: Starts | None = None,
    ) -> dict[str, np.ndarray]:
        """Run a component: inputs cast to the dtypes it declares, outputs to float32.

        A component with one input takes the array itself.
        """
        row = self.bundle.component(component)
        if isinstance(inputs, np.ndarray):
            (name,) = row["inputs"]
            inputs = {name: inputs}
        outputs = self.executor(component)(self.cast(inputs, component), top_k, kappa, starts)
        if self.offload == "block" and len(row["program"]) == 1:
            self._executors.pop(component, None)  # its memory is the next one's
        return {name: to_float32(value) for name, value in outputs.items()}

    def cast(
        self, inputs: Mapping[str, np.ndarray], component: str = "transformer"
    ) -> dict[str, np.ndarray]:
        """A component's inputs in the dtypes that it declares."""
        row = self.bundle.component(component)["inputs"]
        return {name: to_dtype(value, row[name]["dtype"]) for name, value in inputs.items()}

    def executor(self, component: str) -> Executor:
        """The component's executor, opened once.

        "auto" that chose a GPU goes over to ONNX Runtime, with a warning, where it cannot open.
        """
        if component not in self._executors:
            options: dict[str, Any] = {"mode": self.mode, "offload": self.offload}
            if self.backend in PLAN_BACKENDS:
                options = {"experts": self.experts}
            try:
                opened = open_component(
                    self.bundle, component, self.backend, threads=self.threads, **options
                )
            except (ImportError, OSError, ValueError) as error:
                if self.asked != "auto" or self.backend not in GPU_BACKENDS:
                    raise
                log.warning("backend ort in place of %s: %s", self.backend, error)
                self.backend = "ort"
                self._executors.clear()
                return self.executor(component)
            self._executors[component] = opened
        return self._executors[component]

    def warm(self) -> None:
        """Open what stays open now rather than when the first image needs it."""
        for component in self.family.components:
            if self.offload != "block" or len(self.bundle.component(component)["program"]) > 1:
                self.executor(component)
