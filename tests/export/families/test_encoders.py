"""Text encoders and VAE decoder of the tiny bundle through ONNX Runtime, against torch."""

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from export.families.encoders import t5_program
from export.graph.program import Program
from export.graph.trace import keep_float32, weight_specs

LIMIT = 1e-5


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def relative(found: np.ndarray, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    reference = expected.detach().numpy()
    assert found.shape == reference.shape and found.dtype == np.float32
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def random_ids(vocabulary: int, batch: int, tokens: int, last: int) -> torch.Tensor:
    """Random prompts; `last` (end of text) at a different place in every row, then padding."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(4, vocabulary - 2, (batch, tokens), generator=generator)
    for row in range(batch):
        ids[row, tokens - 1 - row :] = last
    return ids


@pytest.mark.parametrize(("batch", "tokens"), [(1, 16), (3, 16), (3, 7)])
def test_clip_equals_torch(
    tiny_bundle: Path, tiny_dense_dir: Path, batch: int, tokens: int
) -> None:
    """The pooled state is the one at the end of text, and later tokens do not reach it."""
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(tiny_dense_dir / "text_encoder").eval()
    end = model.config.eos_token_id
    ids = random_ids(model.config.vocab_size, batch, tokens, end)
    run = session(tiny_bundle / "text_encoder.onnx")
    with torch.no_grad():
        expected = model(ids).pooler_output
    (found,) = run.run(["pooled"], {"input_ids": ids.numpy()})
    assert relative(found, expected) < LIMIT
    changed = ids.clone()
    changed[-1, tokens - batch + 1 :] = 5  # after the first end of text of the last row
    (same,) = run.run(["pooled"], {"input_ids": changed.numpy()})
    np.testing.assert_allclose(same[-1], found[-1], rtol=0, atol=1e-5)
    if batch > 1:
        assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.parametrize(("batch", "tokens"), [(1, 16), (3, 16), (3, 11)])
def test_t5_equals_torch(tiny_bundle: Path, tiny_dense_dir: Path, batch: int, tokens: int) -> None:
    """Relative position buckets follow the number of tokens; padding is seen, as in FLUX."""
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(tiny_dense_dir / "text_encoder_2").eval()
    ids = random_ids(model.config.vocab_size, batch, tokens, model.config.eos_token_id)
    with torch.no_grad():
        expected = model(ids)[0]
    run = session(tiny_bundle / "text_encoder_2.onnx")
    (found,) = run.run(["states"], {"input_ids": ids.numpy()})
    assert relative(found, expected) < LIMIT


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 8, 8), (2, 6, 14)])
def test_vae_equals_torch(
    tiny_bundle: Path, tiny_dense_dir: Path, batch: int, height: int, width: int
) -> None:
    """Both halves, for any batch and image size, not square ones too."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(tiny_dense_dir / "vae").eval()
    shape = (batch, model.config.latent_channels, height, width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(height))
    with torch.no_grad():
        expected = model.decode(latents).sample
        mean = model.encode(expected).latent_dist.mean
    run = session(tiny_bundle / "vae_decoder.onnx")
    (found,) = run.run(["image"], {"latents": latents.numpy()})
    assert found.shape == (batch, 3, 2 * height, 2 * width)
    assert relative(found, expected) < LIMIT
    run = session(tiny_bundle / "vae_encoder.onnx")
    (found,) = run.run(["latents"], {"image": expected.numpy()})
    assert found.shape == shape
    assert relative(found, mean) < LIMIT


def weights_of(program: Program, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's parameters as the graph's weights take them."""
    [row] = program.types.values()
    state = dict(model.named_parameters())
    return {
        name: (state[name].t() if name in row.linears else state[name])
        .detach()
        .to(spec.dtype)
        .numpy()
        for name, spec in row.weights.items()
    }


def test_t5_in_float16_keeps_what_transformers_keeps(tiny_dense_dir: Path, tmp_path: Path) -> None:
    """Weights so large that wo's products overflow float16: in it alone the states are wrong."""
    from onnx.reference import ReferenceEvaluator
    from transformers import T5EncoderModel

    folder = tmp_path / "t5"
    model = T5EncoderModel.from_pretrained(tiny_dense_dir / "text_encoder_2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= {"wi_": 40, "wo.": 100}.get(name.split("Dense.")[-1][:3], 1)
    model.save_pretrained(folder)
    half = T5EncoderModel.from_pretrained(folder, dtype=torch.float16).eval()
    assert half.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    ids = random_ids(model.config.vocab_size, 2, 16, model.config.eos_token_id)
    with torch.no_grad():
        exact, expected = model(ids)[0], half(ids)[0].float()
        naive = model.half()(ids)[0].float()
    assert (naive - exact).abs().max() > 0.1 * exact.abs().max()
    keep_float32(half)
    program = t5_program(half, torch.float16)
    graph = program.types["t5"].graphs[""]
    inputs = {"input_ids": ids.numpy(), **weights_of(program, half)}
    [found] = ReferenceEvaluator(graph).run(None, inputs)
    assert found.dtype == np.float16
    wide = {n for n, spec in program.types["t5"].weights.items() if spec.dtype == torch.float32}
    assert wide == {n for n in inputs if ".wo." in n} and len(wide) == 2
    assert relative(found.astype(np.float32), expected) < 0.01
    assert relative(found.astype(np.float32), exact) < 0.03
    for dtype in (torch.float32, torch.bfloat16):  # which transformers does not keep either
        specs = weight_specs(half, dtype)
        assert {spec.dtype for spec in specs.values()} == {dtype}


def test_what_diffusers_keeps(tiny_dense_dir: Path) -> None:
    """A class of diffusers' keeps its list in both half types, by whole parts of a name."""
    from diffusers import AutoencoderKL

    class Kept(AutoencoderKL):
        _keep_in_fp32_modules = ["conv_norm_out", "conv"]

    model = Kept.from_config(AutoencoderKL.load_config(tiny_dense_dir / "vae"))
    keep_float32(model)
    for dtype in (torch.float16, torch.bfloat16):
        specs = weight_specs(model.decoder, dtype)
        wide = {name for name, spec in specs.items() if spec.dtype == torch.float32}
        assert wide == {n for n in specs if {"conv_norm_out", "conv"} & set(n.split("."))}
        assert 0 < len(wide) < len(specs)


@pytest.mark.parametrize("storage", ["fp16", None])
def test_storage_in_float16_rounds_nothing_that_transformers_keeps(
    tiny_dense_dir: Path, tmp_path: Path, storage: str | None
) -> None:
    """Asked for, or because most of the checkpoint is float16, as transformers saves such a T5."""
    from transformers import T5EncoderModel

    from export.bundle import write_weights
    from export.checkpoint.pipeline import open_components
    from runtime.files.tensors import SafeTensors

    source = Path(shutil.copytree(tiny_dense_dir, tmp_path / "pipeline"))
    half = torch.float32 if storage else torch.float16
    model = T5EncoderModel.from_pretrained(source / "text_encoder_2", dtype=half)
    model.save_pretrained(source / "text_encoder_2")
    component = {each.name: each for each in open_components(source, False, ())}["text_encoder_2"]
    program = component.trace(torch.float32)
    write_weights(tmp_path, component, program, storage, False, None)
    found = SafeTensors(tmp_path / "text_encoder_2.safetensors")
    for name, parameter in model.named_parameters():
        if name.endswith(("wo.weight", "wi_0.weight")):
            assert found.find(name).dtype == ("F32" if ".wo." in name else "F16")
            if ".wo." in name:
                wo = parameter.detach().numpy().T
                assert np.array_equal(found.raw(name).reshape(wo.shape), wo)
