"""What the ControlNets of a generation add in each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.control.controlnet import ControlNet
from runtime.control.given import Control
from runtime.program.residuals import Residuals


class ControlSteps:
    """The ControlNets of a batch.

    tokens: of each control image, [n, T, C], as its ControlNet reads them; executor(net): its
    executor; guidance: for ControlNets that read it where the transformer does not.
    """

    def __init__(
        self,
        controls: Sequence[Control],
        tokens: Sequence[np.ndarray],
        executor: Callable[[ControlNet], Any],
        guidance: float,
    ) -> None:
        self.controls, self.tokens = controls, tokens
        self.executor, self.guidance = executor, guidance

    def at(self, index: int, steps: int, feed: Mapping[str, np.ndarray]) -> Residuals | None:
        """Residuals of step `index` of `steps`; None where nothing is added.

        feed: the transformer's inputs in that step.
        """
        added: dict[int, list[str]] = {}
        values: dict[str, Any] = {}
        adder = None
        for slot, (control, tokens) in enumerate(zip(self.controls, self.tokens, strict=True)):
            if not control.active(index, steps):
                continue
            net, executor = control.net, self.executor(control.net)
            count = len(feed["hidden_states"])
            inputs = net.inputs(
                feed,
                np.tile(tokens, (count // len(tokens), 1, 1)),
                scale=control.scale,
                mode=control.mode,
                guidance=self.guidance,
            )
            adder = adder or executor
            found = executor.values(inputs, slot)
            values |= {f"{slot}/{name}": value for name, value in found.items()}
            for call, names in net.added.items():
                added.setdefault(call, []).extend(f"{slot}/{name}" for name in names)
        return None if adder is None else Residuals(added, values, adder)
