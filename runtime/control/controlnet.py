"""A ControlNet's bundle, opened for the bundle that it controls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.bundle.control_record import COMPONENT
from runtime.bundle.directory import Bundle, open_bundle
from runtime.families import family_of
from runtime.files.tensors import cast
from runtime.program.residuals import Added, added_at


@dataclass(frozen=True)
class ControlNet:
    """An opened ControlNet: where its residuals are added to the transformer, and what it reads."""

    bundle: Bundle
    added: Added

    @property
    def modes(self) -> int:
        """Kinds of control image that a union knows, 0 for a ControlNet of one kind."""
        count: int = self.bundle.manifest["control"]["modes"]
        return count

    def settings(self, latents: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest's `latents` as the latents of control images are scaled."""
        shifted = self.bundle.manifest["control"]["shifted"]
        return dict(latents) | ({} if shifted else {"shift_factor": None})

    def inputs(
        self,
        feed: Mapping[str, np.ndarray],
        control: np.ndarray,
        *,
        scale: float,
        mode: int | None,
        guidance: float,
    ) -> dict[str, np.ndarray]:
        """The component's inputs in its dtypes, of those of the transformer in the same step.

        control: the tokens of the control images, [B, T, C].
        """
        count = len(feed["hidden_states"])
        own = {
            "control": control,
            "scale": np.full((1, 1, 1), scale, np.float32),
            "guidance": np.full(count, guidance, np.float32),
            "mode": np.full(count, mode or 0, np.int64),
        }
        if self.bundle.manifest["control"]["pooled"] == "zeros":
            own["pooled_projections"] = np.zeros_like(feed["pooled_projections"])
        if self.modes:  # the kind's token stands before the text, where text stands
            text = feed["encoder_hidden_states"]
            own["encoder_hidden_states"] = np.concatenate([np.zeros_like(text[:, :1]), text], 1)
            for name in ("rope_cos", "rope_sin"):
                own[name] = np.concatenate([feed[name][:1], feed[name]])
        rows = self.bundle.component(COMPONENT)["inputs"]
        return {
            name: cast(own[name] if name in own else feed[name], row["dtype"])
            for name, row in rows.items()
        }


def open_controlnet(
    path: str | os.PathLike[str], base: Bundle, check: str = "cached", key: Any = None
) -> ControlNet:
    """Open and check a ControlNet's bundle for the bundle `base`; arguments of open_bundle.

    ValueError, one sentence, where it does not fit.
    """
    bundle = open_bundle(path, check, key, controlnet=True)
    theirs, ours = bundle.manifest, base.manifest
    cure = "take the ControlNet of this model, exported with --base for this bundle."
    for name in ("family", "compute_dtype"):
        if theirs[name] != ours[name]:
            raise ValueError(
                f"ControlNet {bundle.path} has the {name} {theirs[name]}, expected {ours[name]},"
                f" which {base.path} has; {cure}"
            )
    row, transformer = bundle.component(COMPONENT), base.component("transformer")
    width, wanted = next(iter(row["outputs"].values()))["shape"][-1], token_width(transformer)
    if width != wanted:
        raise ValueError(
            f"ControlNet {bundle.path} is {width} wide, expected {wanted}, the width of"
            f" {base.path}; {cure}"
        )
    known = {*transformer["inputs"], "control", "scale", "mode", "guidance"}
    for name, tensor in row["inputs"].items():
        read = transformer["inputs"].get(name)
        if name not in known or (read is not None and read["shape"][-1:] != tensor["shape"][-1:]):
            raise ValueError(
                f"ControlNet {bundle.path} reads {name} of shape {tensor['shape']}, expected an"
                f" input of {base.path}; {cure}"
            )
    rule = family_of(ours).residuals
    assert rule is not None, "checked with the manifest"
    try:
        return ControlNet(bundle, added_at(transformer, theirs["control"]["residuals"], rule))
    except ValueError as error:
        raise ValueError(f"ControlNet {bundle.path} does not fit: {error}; {cure}") from None


def token_width(transformer: Mapping[str, Any]) -> int:
    """The width of a transformer's tokens, which its last call reads: [D, channels]."""
    kind = transformer["types"][transformer["program"][-1]["type"]]
    width: int = kind["weights"]["proj_out.weight"]["shape"][0]
    return width
