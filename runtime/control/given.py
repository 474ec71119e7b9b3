"""The control images of a call, checked: one ControlNet each, scales, steps, kinds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.control.controlnet import ControlNet
from runtime.files.checked_json import is_number, is_whole, show
from runtime.images.given import check_encoder, digest, fitting, read_all, rows
from runtime.images.pixels import read_image, to_pixels

log = logging.getLogger("runtime")
MAX_SCALE = 100


@dataclass(frozen=True)
class Control:
    """A ControlNet of a call: pixels [images, 3, H, W] from -1 to 1, its scale, and the share of
    steps from `begin` to `end` in which it is added; mode: of a union, the kind of its image."""

    net: ControlNet
    pixels: np.ndarray
    scale: float
    begin: float
    end: float
    mode: int | None

    def active(self, index: int, steps: int) -> bool:
        """Whether it is added in step `index` of `steps` (read: FluxControlNetPipeline)."""
        inside = index / steps >= self.begin and (index + 1) / steps <= self.end
        return bool(self.scale) and inside

    def settings(self, index: int) -> dict[str, Any]:
        """What image `index` says of it."""
        found = {
            "name": self.net.bundle.name,
            "bundle": self.net.bundle.digest,
            "image": digest(self.pixels[index]),
            "scale": self.scale,
            "range": [self.begin, self.end],
        }
        return found if self.mode is None else found | {"mode": self.mode}


@dataclass(frozen=True)
class Read:
    """A ControlNet of a call before the size of its images is known: [H, W, 3] each."""

    net: ControlNet
    images: Sequence[np.ndarray]
    scale: float
    span: tuple[float, float]
    mode: int | None


def read_controls(
    nets: Sequence[ControlNet],
    control: Any,
    knobs: tuple[Any, Any, Any],
    prompts: int,
    manifest: Mapping[str, Any],
) -> list[Read]:
    """The control images of a call with their scale, range and mode (`knobs`).

    None without ControlNets: then an image is the model's own. ValueError, one sentence, for what
    cannot be.
    """
    named = {f"control_{name}": value for name, value in zip(("scale", "range", "mode"), knobs)}
    for name, value in named.items():
        if value is not None and (control is None or not nets):
            lacks = "ControlNet" if control is not None else "control image"
            raise ValueError(f"{name} is {show(value)} but there is no {lacks}, expected one.")
    if control is None or not nets:
        return []
    check_encoder(manifest, what="control images need")
    images = list(control) if isinstance(control, list | tuple) else [control]
    if len(nets) == 1 and nets[0].modes:
        nets = [nets[0]] * len(images)  # a union answers for every kind of image
    if len(images) != len(nets):
        raise ValueError(
            f"control lists {len(images)} images for {len(nets)} ControlNets, expected one for"
            " each; None leaves a ControlNet out, a list in the list has one per prompt."
        )
    scales, spans, modes = (spread(value, len(images), name) for name, value in named.items())
    found = []
    for net, image, scale, span, mode in zip(nets, images, scales, spans, modes, strict=True):
        if image is not None:
            read = read_all("control", image, prompts, read_image)
            checked = check_scale(scale), check_span(span), check_mode(mode, net)
            found.append(Read(net, read, *checked))
    return found


def control_size(
    manifest: Mapping[str, Any], controls: Sequence[Read], height: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """Height and width, where they are left out those of the first control image (`fitting`)."""
    if not controls or (height is not None and width is not None):
        return height, width
    rows, columns = controls[0].images[0].shape[:2]
    height, width = fitting(manifest, rows, columns, height, width)
    if (rows, columns) != (height, width):
        said = "the control image of %d x %d pixels was made %d x %d, which the model takes"
        log.warning(said, columns, rows, width, height)
    return height, width


def fit_controls(
    controls: Sequence[Read], prompts: int, n: int, height: int, width: int
) -> tuple[Control, ...]:
    """What was read, with pixels of the size that is generated, a row an image."""
    found = []
    for each in controls:
        pixels = rows([to_pixels(image, height, width) for image in each.images], prompts, n)
        assert pixels is not None
        found.append(Control(each.net, pixels, each.scale, *each.span, each.mode))
    return tuple(found)


def spread(value: Any, count: int, name: str) -> list[Any]:
    """One value for all control images, or a list of one for each; a range is two numbers."""
    many = isinstance(value, list | tuple)
    if not many or (name == "control_range" and all(is_number(each) for each in value)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name} lists {len(value)} values for {count} control images, expected one, or one for"
            " each."
        )
    return list(value)


def check_scale(value: Any) -> float:
    """A number; 1 unless it is given."""
    value = 1.0 if value is None else value
    if not is_number(value) or not abs(value) <= MAX_SCALE:
        what = f"a number from -{MAX_SCALE} to {MAX_SCALE}"
        raise ValueError(f"control_scale is {show(value)}, expected {what}.")
    return float(value)


def check_span(value: Any) -> tuple[float, float]:
    """Two shares of the steps, 0 to 1, the first below the second."""
    what = "two numbers from 0 to 1, the first below the second, such as (0, 0.6)"
    if value is None:
        return 0.0, 1.0
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
    if not pair or not 0 <= value[0] < value[1] <= 1:
        raise ValueError(f"control_range is {show(value)}, expected {what}.")
    return float(value[0]), float(value[1])


def check_mode(value: Any, net: ControlNet) -> int | None:
    """The kind of a union's control image; None for a ControlNet of one kind."""
    if not net.modes:
        if value is not None:
            raise ValueError(
                f"control_mode is {show(value)}, expected none: {net.bundle.name} is a ControlNet"
                " of one kind."
            )
        return None
    if not is_whole(value) or not 0 <= value < net.modes:
        raise ValueError(
            f"control_mode is {show(value)}, expected a whole number from 0 to {net.modes - 1}: the"
            f" kind of image that the union {net.bundle.name} gets (its model card names them)."
        )
    return int(value)
