"""A bundle opened on a backend: its family, its tokenizers and its components' executors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle.control_record import COMPONENT
from runtime.bundle.directory import Bundle, open_bundle, required_key
from runtime.bundle.lora_record import placement_of
from runtime.bundle.tokenizer_file import MAX_BYTES
from runtime.control.controlnet import ControlNet, open_controlnet
from runtime.families import family_of, is_guided
from runtime.families.flux2 import STATES
from runtime.files.hashes import sha256
from runtime.files.tensors import cast, to_float32
from runtime.lora.file import read_lora
from runtime.lora.placement import Adapters, Placement
from runtime.program.backends import GPU_BACKENDS, PLAN_BACKENDS, check_experts, check_offload
from runtime.program.executor import Executor, batch_limit, choose_backend, open_component
from runtime.program.threads import thread_count
from runtime.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from runtime.bundle.block_groups import Starts
    from runtime.lora.changes import Change
    from runtime.program.residuals import Residuals
    from runtime.program.step_cache import StepCache

log = logging.getLogger("runtime")
StepHook = Callable[[Mapping[str, np.ndarray], int | None, int | None], None]
VERIFY = ("cached", "full")
ADAPTED = ("transformer", STATES)  # components that LoRAs change
MAX_LORAS = 8  # that stay read


@dataclass(frozen=True)
class LoRA:
    """A LoRA file that was read: its name, SHA-256, what it changes, and its strength here."""

    file: str
    sha256: str
    changes: Mapping[str, Change] = field(repr=False)
    strength: float = 1.0

    def row(self) -> dict[str, Any]:
        """What an image says of it."""
        return {"file": self.file, "sha256": self.sha256, "strength": self.strength}


def default_bundle() -> Path:
    """The bundle that ships with the package."""
    return Path(__file__).parent / "default"


class Opened:
    """A bundle opened on a backend, as runtime.sampling takes it.

    Components are opened when first needed. `mode` ("graph" or "blocks") is ONNX Runtime's
    alone, see runtime.ort.component; `experts` ("auto", "plans" or "cubins") that of plans, see
    runtime.trt.experts. `verify` "full" computes every file's hash anew; `key` is a public key's
    file by which the bundle must be signed (None: D2M_PUBLIC_KEY of the environment, if set). The
    same seed, bundle, backend and batch give the same bytes; another batch size may round sums
    differently, and so change an image's last bits. A batch of fewer rows than
    `min_batch` is filled up with copies of its last one, which are thrown away; 1 and more say
    that from so many rows on nothing changes (runtime.serve.batch_invariance). With `offload`
    "block" the transformer's weights are streamed block by block (see runtime.ort.block_weights),
    and the other components are open only while they run. `loras`: see `set_loras`; `controlnets`:
    bundles of ControlNets, checked as `bundle` is.
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
        loras: Mapping[Any, float] | None = None,
        controlnets: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        if isinstance(bundle, Bundle):
            opened = bundle
        else:
            if verify not in VERIFY:  # never "sizes" alone: images are generated
                raise ValueError(f"--verify is {verify!r}, expected one of {', '.join(VERIFY)}.")
            key = required_key() if key is None else key
            opened = open_bundle(bundle or default_bundle(), verify, key)
        self.bundle = opened
        self.manifest: dict[str, Any] = opened.manifest
        self.family = family_of(self.manifest)
        self.family.check_scheduler(self.manifest["scheduler"])
        self.requested = backend
        self.offload = check_offload(offload)
        self.backend, reason = choose_backend(opened, backend, self.offload)
        log.info("backend %s (%s)", self.backend, reason)
        check_experts(experts, self.backend)
        check_offload(self.offload, self.backend)
        self.threads, self.mode, self.experts = threads, mode, experts
        self.controlnets = tuple(open_controlnet(path, opened, verify, key) for path in controlnets)
        limits = (batch_limit(each, self.backend) for each in self.bundles())
        limit = min(limits) // (1 + is_guided(opened.manifest))  # rows an image
        self.max_batch = min(max_batch, max(1, limit))
        self.min_batch = min(min_batch, self.max_batch)
        self.step_hook: StepHook | None = None  # called with every step's inputs, top_k and kappa
        self._executors: dict[str, Executor] = {}  # by component, or a ControlNet's digest
        self.loras: tuple[LoRA, ...] = ()
        self._adapters: Adapters | None = None
        self._placement: Placement | None = None
        self._read: dict[tuple[Any, ...], LoRA] = {}
        specs = self.manifest["tokenizers"]
        self.tokenizers = {
            name: TextTokenizer(name, opened.file(file), specs[name], opened.read(file, MAX_BYTES))
            for name, file in ((name, specs[name]["file"]) for name in self.family.tokenizers)
        }
        if loras:
            self.set_loras(loras)

    def execute(
        self,
        component: str,
        inputs: np.ndarray | dict[str, np.ndarray],
        top_k: int | None = None,
        kappa: int | None = None,
        starts: Starts | None = None,
        cache: StepCache | None = None,
        residuals: Residuals | None = None,
    ) -> dict[str, np.ndarray]:
        """Run a component: inputs cast to the dtypes it declares, outputs to float32.

        A component with one input takes the array itself.
        """
        row = self.bundle.component(component)
        if isinstance(inputs, np.ndarray):
            (name,) = row["inputs"]
            inputs = {name: inputs}
        knobs = top_k, kappa, starts, cache, residuals
        outputs = self.executor(component)(self.cast(inputs, component), *knobs)
        if self.offload == "block" and len(row["program"]) == 1:
            self._executors.pop(component, None)  # its memory is the next one's
        return {name: to_float32(value) for name, value in outputs.items()}

    def cast(
        self, inputs: Mapping[str, np.ndarray], component: str = "transformer"
    ) -> dict[str, np.ndarray]:
        """A component's inputs in the dtypes that it declares."""
        row = self.bundle.component(component)["inputs"]
        return {name: cast(value, row[name]["dtype"]) for name, value in inputs.items()}

    def executor(self, component: str) -> Executor:
        """The component's executor, opened once.

        "auto" that chose a GPU goes over to ONNX Runtime, with a warning, where it cannot open.
        """
        if component not in self._executors:
            self._open(component, self.bundle, component, self.experts)
            if component in ADAPTED and self._adapters is not None:
                self._adapt(self._adapters)
        return self._executors[component]

    def control_executor(self, net: ControlNet) -> Any:
        """A ControlNet's executor (runtime.program.residuals.Adder), on the same backend."""
        digest = net.bundle.digest
        if digest not in self._executors:
            self._open(digest, net.bundle, COMPONENT, "auto")
        return self._executors[digest]

    def _open(self, key: str, bundle: Bundle, component: str, experts: str) -> None:
        options: dict[str, Any] = {"mode": self.mode, "offload": self.offload}
        if self.backend in PLAN_BACKENDS:
            options = {"experts": experts}
        try:
            self._executors[key] = open_component(
                bundle, component, self.backend, threads=self.threads, **options
            )
        except (ImportError, OSError, ValueError) as error:
            if self.requested != "auto" or self.backend not in GPU_BACKENDS:
                raise
            log.warning("backend ort in place of %s: %s", self.backend, error)
            self.backend = "ort"
            self._executors.clear()
            self._open(key, bundle, component, experts)

    def bundles(self) -> list[Bundle]:
        """The bundle, and those of its ControlNets."""
        return [self.bundle, *(net.bundle for net in self.controlnets)]

    def set_loras(self, loras: Mapping[Any, float] | None = None) -> None:
        """Generate with these LoRAs from the next call on: file -> strength, times its own.

        They take the place of those set before; none, or a strength of 0, leaves no trace. Not to
        be called while another thread generates. FileNotFoundError or ValueError, one sentence,
        for what is no LoRA of the dense model; then nothing has changed.
        """
        for file, strength in (loras or {}).items():
            if isinstance(strength, bool) or not isinstance(strength, int | float):
                raise ValueError(f"the strength of {file} is {strength!r}, expected a number.")
            if not -100 <= strength <= 100:
                raise ValueError(f"the strength of {file} is {strength}, expected -100 to 100.")
        found, adapters = [], None
        if loras:
            self._placement = self._placement or placement_of(self.bundle)
            found = [self.read_lora(Path(file), by) for file, by in loras.items()]
            adapters = Adapters(self._placement, [(each.changes, each.strength) for each in found])
            adapters = adapters if adapters.by_tensor else None
        self._adapt(adapters)
        self.loras, self._adapters = tuple(found), adapters

    def _adapt(self, adapters: Adapters | None) -> None:
        for name in ADAPTED:
            executor: Any = self._executors.get(name)  # every backend's is Adaptable
            if executor is not None:
                executor.adapt(adapters)

    def read_lora(self, path: Path, strength: float) -> LoRA:
        """A LoRA's changes; the last few stay read."""
        assert self._placement is not None
        try:
            facts = path.stat()
            key = (str(path.resolve()), facts.st_mtime_ns, facts.st_size)
        except OSError:
            key = (str(path), 0, 0)  # reading says what is wrong
        if key not in self._read:
            changes = read_lora(path, self._placement.linears)
            try:
                self._placement.tensors_of(changes)
            except ValueError as error:
                raise ValueError(f"{path} {error}") from None
            while len(self._read) >= MAX_LORAS:
                self._read.pop(next(iter(self._read)))
            self._read[key] = LoRA(path.name, sha256(path), changes)
        return replace(self._read[key], strength=float(strength))

    def truncations(self, prompt: str) -> list[str]:
        """What the tokenizers leave out of a prompt that is too long for them, a clause each."""
        text = self.family.with_template(prompt)
        return [clause for each in self.tokenizers.values() if (clause := each.truncation(text))]

    def warnings(
        self, prompts: Sequence[str], height: int | None = None, width: int | None = None
    ) -> list[str]:
        """What lets images come out worse than they could, a clause each (ours): words that a
        tokenizer spells letter by letter, a size far from the one that the bundle names.

        They quote the prompt, so they are for who wrote it and for no log.
        """
        clauses = []
        for name, tokenizer in self.tokenizers.items():
            texts = map(self.family.with_template, prompts)
            words = list(dict.fromkeys(w for text in texts for w in tokenizer.unknown_words(text)))
            if words:
                listed = ", ".join(map(repr, words[:8]))
                clauses.append(f"{name} has no tokens for {listed}: the model may not know them")
        usual = self.manifest["defaults"]
        height, width = height or usual["height"], width or usual["width"]
        area = height * width / (usual["height"] * usual["width"])
        if area >= 4 or area <= 1 / 8:
            clauses.append(
                f"{width} x {height} is far from {usual['width']} x {usual['height']}, the size "
                "that this bundle generates by default: the model may not have learned it; height"
                " and width choose another"
            )
        return clauses

    def warm(self) -> None:
        """Open what stays open now rather than when the first image needs it."""
        for component in self.family.components:
            if self.offload != "block" or len(self.bundle.component(component)["program"]) > 1:
                self.executor(component)
        for net in self.controlnets:
            self.control_executor(net)

    def close(self) -> None:
        """Give the executors' memory back; what needs one afterwards opens it again."""
        self._executors.clear()

    def setting(self) -> dict[str, Any]:
        """What the time of a call depends on, beside its arguments: bundle, backend, options."""
        size = self.manifest["files"][self.bundle.component("transformer")["weights"]]["size"]
        nets = self.controlnets
        return {
            "bundle": self.bundle.digest,
            "backend": self.backend,
            "threads": thread_count(self.threads, size),
            "offload": self.offload,
            "experts": self.experts,
            "mode": self.mode,
            "max_batch": self.max_batch,
            "min_batch": self.min_batch,
            **({"controlnets": [net.bundle.digest for net in nets]} if nets else {}),
        }
