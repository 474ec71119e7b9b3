"""ControlNets against diffusers: FLUX.1's and its unions, SD3's and SD3.5 large's, at tiny size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import runtime
from d2m.model.surgery import set_top_k
from runtime.bundle.control_record import COMPONENT
from runtime.bundle.directory import open_bundle
from runtime.control.controlnet import open_controlnet
from runtime.control.given import Control
from runtime.control.steps import ControlSteps
from runtime.families import family_of
from runtime.image import settings_of
from runtime.ort.component import open_component
from runtime.program.residuals import Residuals, added_at
from runtime.trt.component import Plans
from tests.conftest import exported
from tests.stand_ins.device import TARGET, HostContext, HostDevice, bundle_with_plans
from tests.tiny.control import flux_controlnet, sd3_controlnet
from tests.tiny.families import SIZE, sd3
from tests.tiny.grouped import GROUPS, feed_of, load_transformer
from tests.tiny.pipeline import IMAGE_SIZE, MAX_SEQUENCE_LENGTH, tiny_inputs

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["a red circle", "two blue squares"]
Nets = dict[str, tuple[Any, Path]]  # diffusers' ControlNet and its bundle


def exported_nets(root: Path, base: Path, nets: dict[str, Any]) -> Nets:
    from export.control.bundle import export_controlnet

    for name, net in nets.items():
        net.save_pretrained(root / name)
        export_controlnet(root / name, root / f"{name}-bundle", base)
    return {name: (net, root / f"{name}-bundle") for name, net in nets.items()}


@pytest.fixture(scope="module")
def flux_nets(tmp_path_factory: pytest.TempPathFactory, tiny_dense_bundle: Path) -> Nets:
    nets = {
        "edges": flux_controlnet(7),
        "depth": flux_controlnet(8),
        "union": flux_controlnet(9, num_mode=3, num_layers=2, num_single_layers=0),
    }
    return exported_nets(tmp_path_factory.mktemp("flux"), tiny_dense_bundle, nets)


@pytest.fixture(scope="module")
def sd3_base(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> tuple[Any, Path]:
    """A dense SD3 pipeline and its bundle."""
    from d2m.families.generation_defaults import write_defaults

    path, pipe = tmp_path_factory.mktemp("sd3") / "control-sd3", sd3()
    pipe.save_pretrained(path)
    write_defaults(path, height=SIZE, width=SIZE)
    return pipe, exported(pytestconfig, path)


@pytest.fixture(scope="module")
def sd3_nets(tmp_path_factory: pytest.TempPathFactory, sd3_base: tuple[Any, Path]) -> Nets:
    large = {"joint_attention_dim": None, "use_pos_embed": False, "dual_attention_layers": ()}
    nets = {
        "instantx": sd3_controlnet(7),
        "large": sd3_controlnet(8, **large, force_zeros_for_pooled_projection=False),
    }
    return exported_nets(tmp_path_factory.mktemp("sd3-nets"), sd3_base[1], nets)


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers samples the latents of control images; the runtime takes their mean."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )


def image(seed: int, side: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(colours)


def ours(pipe: Any, steps: int, noise: torch.Tensor, **options: Any) -> np.ndarray:
    """The last latents of a generation."""
    kept: list[np.ndarray] = []
    pipe(
        PROMPTS,
        latents=noise.numpy(),
        steps=steps,
        callback=lambda i, n, x: kept.append(x),
        **options,
    )
    assert len(kept) == steps
    return kept[-1]


def test_flux_draws_as_diffusers_does(
    tiny_dense_dir: Path, tiny_dense_bundle: Path, flux_nets: Nets
) -> None:
    """One ControlNet, two with scales and ranges, a union with two kinds of image."""
    from diffusers import FluxControlNetPipeline, FluxMultiControlNetModel

    noise = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    one, two = image(1, IMAGE_SIZE), image(2, IMAGE_SIZE)
    (edges, a), (depth, b), (union, c) = flux_nets.values()
    cases: list[tuple[Any, list[Path], dict[str, Any], dict[str, Any]]] = [
        (
            edges,
            [a],
            {"control": one, "control_scale": 0.7, "control_range": (0.25, 0.75)},
            {"control_image": one, "controlnet_conditioning_scale": 0.7}
            | {"control_guidance_start": 0.25, "control_guidance_end": 0.75},
        ),
        (
            FluxMultiControlNetModel([edges, depth]),
            [a, b],
            {
                "control": [one, two],
                "control_scale": [0.5, 0.9],
                "control_range": [(0, 0.5), (0.5, 1)],
            },
            {"control_image": [one, two], "controlnet_conditioning_scale": [0.5, 0.9]}
            | {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]},
        ),
        (
            FluxMultiControlNetModel([union]),
            [c],
            {"control": [one, two], "control_scale": [0.5, 0.9], "control_mode": [2, 0]},
            {"control_image": [one, two], "controlnet_conditioning_scale": [0.5, 0.9]}
            | {"control_mode": [2, 0], "control_guidance_start": [0.0] * 2}
            | {"control_guidance_end": [1.0] * 2},
        ),
    ]
    for net, bundles, mine, theirs in cases:
        pipe = FluxControlNetPipeline.from_pretrained(
            tiny_dense_dir, controlnet=net, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            expected = pipe(
                PROMPTS,
                latents=noise,
                num_inference_steps=4,
                guidance_scale=3.5,
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                output_type="latent",
                **theirs,
            ).images.numpy()
        for mode in (None, "blocks"):
            drawer = runtime.load(tiny_dense_bundle, "ort", threads=1, controlnets=bundles)
            drawer.mode = mode
            found = ours(drawer, 4, noise, guidance=3.5, **mine)
            assert np.abs(found - expected).max() < 1e-4
        plain = ours(drawer, 4, noise, guidance=3.5)
        assert np.abs(plain - expected).max() > 1e-2
        none = ours(drawer, 4, noise, guidance=3.5, **{**mine, "control_scale": 0})
        assert np.array_equal(none, plain)


def test_sd3_draws_as_diffusers_does(sd3_base: tuple[Any, Path], sd3_nets: Nets) -> None:
    """With a negative prompt; of both kinds: InstantX', and those of 3.5 large."""
    from diffusers import StableDiffusion3ControlNetPipeline

    base, bundle = sd3_base
    one = image(3, SIZE)
    noise = torch.randn(2, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(1))
    for net, path in sd3_nets.values():
        pipe = StableDiffusion3ControlNetPipeline(**base.components, controlnet=net)
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            expected = pipe(
                PROMPTS,
                negative_prompt=["a black star"] * 2,
                latents=noise,
                num_inference_steps=3,
                guidance_scale=4.0,
                height=SIZE,
                width=SIZE,
                control_image=one,
                controlnet_conditioning_scale=0.6,
                control_guidance_end=0.7,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                output_type="latent",
            ).images.numpy()
        drawer = runtime.load(bundle, "ort", threads=1, controlnets=[path])
        mine = {"negative": "a black star", "guidance": 4.0, "control": one}
        found = ours(drawer, 3, noise, **mine, control_scale=0.6, control_range=(0, 0.7))
        assert np.abs(found - expected).max() < 1e-4
        assert np.abs(ours(drawer, 3, noise, **mine, control_scale=0) - expected).max() > 1e-2


def at_its_places(model: Any, starts: dict[str, int] | None) -> Any:
    """A sparse transformer without groups: their blocks at the dense model's places.

    starts: group -> the one block of it that runs, counted in the group; None: all of them do.
    """
    from d2m.model.block_group import BlockGroup, SkippedBlock

    model = copy.deepcopy(model)
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        blocks = list(getattr(model, kind))
        for index, group in enumerate(list(blocks)):
            if isinstance(group, BlockGroup):
                for offset, (place, block) in enumerate(zip(group.indices, group.blocks.values())):
                    runs = starts is None or starts[f"{kind}.{index}"] == offset
                    blocks[place] = block if runs else SkippedBlock(block)
        setattr(model, kind, torch.nn.ModuleList(blocks))
    return model


def test_residuals_are_added_at_the_dense_models_places(
    tiny_grouped_dir: Path, tiny_grouped_bundle: Path, flux_nets: Nets
) -> None:
    """Whether a block there runs, its group chose others, or it was left out (the last single)."""
    base = open_bundle(tiny_grouped_bundle)
    adder: Any = open_component(open_controlnet(flux_nets["edges"][1], base).bundle, COMPONENT)
    counts, rng = (
        {"transformer_blocks": 3, "single_transformer_blocks": 2},
        np.random.default_rng(5),
    )
    samples = {
        stem: rng.standard_normal((count, 2, 16, 32), np.float32) for stem, count in counts.items()
    }
    values = {
        f"{stem}.{index}": onnxruntime.OrtValue.ortvalue_from_numpy(sample)
        for stem, rows in samples.items()
        for index, sample in enumerate(rows)
    }
    rule = family_of(base.manifest).residuals
    assert rule is not None
    residuals = Residuals(added_at(base.component("transformer"), counts, rule), values, adder)
    model, inputs = load_transformer(tiny_grouped_dir), tiny_inputs(4)
    set_top_k(model, 2)
    executor: Any = open_component(base, "transformer", mode="blocks")
    for chosen in (None, [dict.fromkeys(GROUPS, row) for row in (0, 2)]):
        kappa = 3 if chosen is None else 1
        starts = {name: np.array([0, 2]) for name in GROUPS} if chosen else None
        found = executor(feed_of(model, inputs), 2, kappa, starts, None, residuals)["sample"]
        for row in range(2):
            one = {n: t[row : row + 1] if not n.endswith("_ids") else t for n, t in inputs.items()}
            added = {
                s: [torch.tensor(each[row : row + 1]) for each in r] for s, r in samples.items()
            }
            with torch.no_grad():
                expected = at_its_places(model, chosen and chosen[row])(
                    **one,
                    controlnet_block_samples=added["transformer_blocks"],
                    controlnet_single_block_samples=added["single_transformer_blocks"],
                    return_dict=False,
                )[0]
            assert np.abs(found[row] - expected[0].numpy()).max() < 1e-4


def test_plans_add_what_onnx_runtime_adds(
    tiny_grouped_dir: Path, tiny_grouped_bundle: Path, flux_nets: Nets, tmp_path: Path
) -> None:
    """All but the launch: one plan with and without, and a ControlNet that runs twice a step."""
    base = bundle_with_plans(tiny_grouped_bundle, tmp_path / "base")
    net = open_controlnet(flux_nets["edges"][1], base)
    planned = bundle_with_plans(flux_nets["edges"][1], tmp_path / "net")
    device = HostDevice()
    plans, control = (
        Plans(bundle, name, TARGET, device, lambda _, path: HostContext(path, device))
        for bundle, name in ((base, "transformer"), (planned, COMPONENT))
    )
    ort: Any = open_component(base, "transformer", mode="blocks")
    net_ort: Any = open_component(net.bundle, COMPONENT, mode="blocks")
    feed = feed_of(load_transformer(tiny_grouped_dir), tiny_inputs(4))
    rng = np.random.default_rng(6)
    tokens = [rng.standard_normal((2, 16, 16), np.float32) for _ in range(2)]
    pixels = np.zeros((2, 3, 1, 1), np.float32)
    controls = [
        Control(net, pixels, scale, 0.0, end, None) for scale, end in ((0.8, 1), (0.5, 0.5))
    ]
    for kappa in (3, 1):
        plain = plans(feed, 2, kappa)["sample"]
        for step in (0, 1, 0):  # both, the first alone, both again
            found, expected = (
                run(feed, 2, kappa, None, None, steps.at(step, 2, feed))["sample"]
                for run, steps in (
                    (plans, ControlSteps(controls, tokens, lambda _: control, 3.5)),
                    (ort, ControlSteps(controls, tokens, lambda _: net_ort, 3.5)),
                )
            )
            assert np.abs(found - expected).max() < 1e-4 < np.abs(found - plain).max()
        assert np.array_equal(plans(feed, 2, kappa)["sample"], plain)


def test_bad_input_is_refused_in_one_sentence(
    tiny_dense_bundle: Path, flux_nets: Nets, tmp_path: Path
) -> None:
    from export.control.bundle import export_controlnet

    edges, union = flux_nets["edges"][1], flux_nets["union"][1]
    one = image(1, IMAGE_SIZE)
    two, single, none = (
        runtime.load(tiny_dense_bundle, "ort", threads=1, controlnets=nets)
        for nets in ([edges, union], [union], [])
    )
    for pipe, given, said in [
        (two, {"control": one}, "control lists 1 images for 2 ControlNets, expected one for each"),
        (two, {"control_scale": 0.5}, "control_scale is 0.5 but there is no control image"),
        (none, {"control": one}, "a control image is given, expected none"),
        (none, {"control": one, "control_mode": 1}, "control_mode is 1 but there is no ControlNet"),
        (single, {"control": one}, "control_mode is None, expected a whole number from 0 to 2"),
        (two, {"control": [one, None], "control_mode": 0}, "expected none: .* of one kind"),
        (
            two,
            {"control": [one, None], "control_scale": "x"},
            "control_scale is .x., expected a nu",
        ),
        (two, {"control": [one, None], "control_range": (0.6, 0.2)}, "expected two numbers from 0"),
        (two, {"control": [one, None], "control_scale": [1, 2, 3]}, "lists 3 values for 2"),
        (two, {"control": ["a.png", None]}, "expected a PIL image or an array"),
    ]:
        with pytest.raises(ValueError, match=said):
            pipe(PROMPTS[0], steps=1, **given)
    with pytest.raises(ValueError, match="holds no ControlNet but a whole model, expected"):
        runtime.load(tiny_dense_bundle, controlnets=[tiny_dense_bundle])
    with pytest.raises(ValueError, match="holds a ControlNet, expected a bundle that generates"):
        runtime.load(edges)
    for name, net, said in [
        ("pixels", flux_controlnet(conditioning_embedding_channels=16), "that read pixels .*XLabs"),
        (
            "wide",
            flux_controlnet(joint_attention_dim=48),
            "has joint_attention_dim 48, expected 32",
        ),
    ]:
        net.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=said):
            export_controlnet(tmp_path / name, tmp_path / "out", tiny_dense_bundle)


def test_the_command_line(
    tiny_dense_bundle: Path, flux_nets: Nets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """d2m run follows an image, says so in the file, and generates it again from the same."""
    from d2m.cli import main

    net, file, out = flux_nets["union"][1], tmp_path / "edges.png", tmp_path / "out.png"
    image(1, IMAGE_SIZE).save(file)
    followed = ["--controlnet", str(net), "--control", str(file)]
    run = ["run", str(tiny_dense_bundle), PROMPTS[0], "--backend", "ort", "--steps", "2", *followed]
    run += ["--control-scale", "0.5", "--control-range", "0,0.5", "--control-mode", "1"]
    assert main([*run, "-o", str(out)]) == 0
    (said,) = settings_of(out)["controlnets"]
    assert (said["scale"], said["range"], said["mode"]) == (0.5, [0, 0.5], 1)
    again = ["run", str(tiny_dense_bundle), "--regenerate", str(out), "-o", str(tmp_path / "2.png")]
    capsys.readouterr()
    assert main([*again, *followed, "--json"]) == 0
    assert '"same": true' in capsys.readouterr().out
    assert main(again) != 0 and "was generated with the ControlNets" in capsys.readouterr().err
    assert main(["inspect", str(net)]) == 0
    assert "a union of 3 kinds" in capsys.readouterr().out


@pytest.mark.tensorrt
def test_plans_build_without_a_gpu(
    tiny_dense_bundle: Path, flux_nets: Nets, tmp_path: Path
) -> None:
    """In bfloat16, attention fused; a union's text is one token longer than the transformer's."""
    pytest.importorskip("tensorrt_rtx")
    from export.control.bundle import export_controlnet

    source, out = flux_nets["union"][1].with_name("union"), tmp_path / "out"
    export_controlnet(source, out, tiny_dense_bundle, trt_rtx=True)
    manifest = open_bundle(out, controlnet=True).manifest
    (target,) = manifest["plans"].values()
    assert set(target["files"]) == {
        f"{COMPONENT}/{n}" for n in ("embed", "double", "residual", "add")
    }
    assert target["dtype"] == "bfloat16"
    assert target["profiles"]["text_tokens"][2] == MAX_SEQUENCE_LENGTH + 1
