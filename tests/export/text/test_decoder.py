"""Decoders as text encoders against transformers' models, and what is not compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from export.text.decoder import decoder_program
from tests.tiny.pipeline import randomize

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def qwen3(**more: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return randomize(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 8, **more})), 0).eval()


def mistral(**more: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**SIZES, "sliding_window": None, **more})
    return randomize(MistralForCausalLM(config), 0).eval()


def llama(**more: Any) -> Any:
    """Rotary frequencies stretched in parts, biases, one group of keys for all heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    stretched = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 1e4}
    stretched |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    own = {"rope_parameters": stretched, "attention_bias": True, "num_key_value_heads": 1}
    return randomize(LlamaForCausalLM(LlamaConfig(**{**SIZES, **own, **more})), 0).eval()


def run(model: Any, layers: tuple[int, ...], ids: Any, mask: Any) -> np.ndarray:
    """The program's states, block by block in ONNX Runtime."""
    program = decoder_program(model, "model", layers, torch.float32)
    env = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    weights = dict(model.named_parameters())
    sessions = {
        name: ort.InferenceSession(
            row.graphs[""].SerializeToString(), providers=["CPUExecutionProvider"]
        )
        for name, row in program.types.items()
    }
    for kind, prefix in program.calls:
        row = program.types[kind]
        feed = {name: env[name] for name in row.inputs}
        for name in row.weights:
            tensor = weights[prefix + name].detach()
            feed[name] = (tensor.t() if name in row.linears else tensor).contiguous().numpy()
        known = {value.name for value in sessions[kind].get_inputs()}
        found = sessions[kind].run(None, {n: each for n, each in feed.items() if n in known})
        env |= zip(row.outputs, found, strict=True)
    return env["states"]


@pytest.mark.parametrize("build", [qwen3, mistral, llama])
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_those_of_the_model(build: Any, side: str) -> None:
    """Of every token, padding too, on either side; texts of several lengths in one batch."""
    model, draw = build(), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 60, (3, 11), generator=draw)
    mask = torch.ones(3, 11, dtype=torch.long)
    for row, count in enumerate((0, 4, 10)):
        mask[row, slice(11 - count, None) if side == "right" else slice(count)] = 0
    found = run(model, (1, 3), ids, mask)
    assert model.config._attn_implementation == "d2m_export"
    plain = build()  # with torch's own attention
    with torch.no_grad():
        output = plain(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
    expected = torch.cat([output.hidden_states[1], output.hidden_states[3]], dim=-1).numpy()
    assert found.shape == (3, 11, 48)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-6


@pytest.mark.parametrize(
    ("model", "layers", "words"),
    [
        (lambda: qwen3(), (1, 4), "has 4 layers, expected more than the 4"),
        (lambda: mistral(sliding_window=64), (2,), "sliding window of 64 tokens, expected none"),
    ],
)
def test_what_is_not_compiled_is_told(model: Any, layers: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decoder_program(model(), "model", layers, torch.float32)


def test_a_wide_sliding_window_hides_nothing() -> None:
    """Texts have at most 4096 tokens."""
    model = mistral(sliding_window=4096, num_hidden_layers=2)
    program = decoder_program(model, "model", (1,), torch.float32)
    assert [kind for kind, _ in program.calls] == ["embed", "layer", "keep_0", "states"]
