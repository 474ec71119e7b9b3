"""ControlNets: images such as edges or depth that the denoising follows.

A ControlNet's bundle and the bundle that it controls enter; for every step leave the residuals that
the transformer's executor adds behind its blocks (runtime.program.residuals).

    controlnet  A ControlNet's bundle, opened for the bundle that it controls
    given       The control images of a call, checked: scales, steps, kinds
    steps       What the ControlNets of a generation add in each of its steps
"""

from typing import TYPE_CHECKING

from runtime.files.lazy import lazy

if TYPE_CHECKING:
    from runtime.control.controlnet import ControlNet, open_controlnet

__getattr__, __dir__, __all__ = lazy(
    __name__, {"runtime.control.controlnet": "ControlNet open_controlnet"}
)
