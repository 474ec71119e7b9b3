"""Real-size blocks of FLUX.2 in ONNX Runtime on the CPU against torch, one of each kind.

    python -m scripts.bench.big_flux2_blocks SPARSE BUNDLE [--tokens 64] [--text 16] [--json FILE]

SPARSE and BUNDLE as scripts.bench.big --flux2 ... --keep leaves them: random weights in bfloat16.
A double block, a single block and a layer of the text encoder are read alone, computed in float32
by torch (diffusers' block with SparseFFNs, transformers' layer) and by the bundle's graphs, whose
weights are streamed: memory is that of one block.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.big_blocks import error
from scripts.figures import options, write_figures

BLOCKS = {"double": "transformer_blocks.1", "single": "single_transformer_blocks.2"}
LAYER = "model.layers.5"
Arrays = dict[str, np.ndarray]


def main(argv: list[str] | None = None) -> int:
    """Compare, print and write the figures; 1 where float32 differs by more than 1e-4."""
    parser = options(__doc__)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="of the image (%(default)s)")
    parser.add_argument("--text", type=int, default=16, help="tokens of the text (%(default)s)")
    arguments = parser.parse_args(argv)
    image, text = arguments.tokens, arguments.text
    figures: dict[str, Any] = {"image_tokens": image, "text_tokens": text, "relative_error": {}}
    for kind, name in BLOCKS.items():
        given, expected = transformer_block(arguments.sparse, name, image, text)
        found = run(arguments.bundle, "transformer", kind, f"{name}.", given)
        figures["relative_error"][name] = error(found, expected)
    given, expected = text_layer(arguments.sparse, text)
    found = run(arguments.bundle, "text_encoder", "layer", f"{LAYER}.", given)
    figures["relative_error"][LAYER] = error(found, expected)
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(figures, indent=2))
    if arguments.json:
        write_figures(arguments.json, "scripts.bench.big_flux2_blocks", figures)
    return int(max(figures["relative_error"].values()) > 1e-4)


def transformer_block(sparse: Path, name: str, image: int, text: int) -> tuple[Arrays, Arrays]:
    """What goes into a block of the checkpoint and torch's answer, in the bundle's names."""
    import torch

    from d2m.families.known import FLUX2
    from d2m.model.components import empty_model
    from d2m.model.sparse_transformer import sparse_class
    from export.families.flux2 import KEYWORDS, MODULATIONS

    model: Any = empty_model(sparse / "transformer", sparse_class(FLUX2))
    block = model.get_submodule(name)
    filled(block, sparse / "transformer", name)
    size, width = model.config.attention_head_dim, model.inner_dim
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=draw)

    tables = noise(image + text, size).sin(), noise(image + text, size).cos()
    given = {"hidden_states": noise(1, image, width)}
    given["encoder_hidden_states"] = noise(1, text, width)
    named = {
        each: noise(1, count * width)
        for each, (module, count) in MODULATIONS.items()
        if module.startswith("single") == name.startswith("single")
    }
    more = {"split_hidden_states": True} if name.startswith("single") else {}
    keywords = {KEYWORDS[each]: value for each, value in named.items()}
    with torch.no_grad():
        words, picture = block(**given, **keywords, image_rotary_emb=tables, **more)
    rope = dict(zip(("rope_cos", "rope_sin"), tables))
    found = {key: value.numpy() for key, value in (given | named | rope).items()}
    return found, {"hidden_states": picture.numpy(), "encoder_hidden_states": words.numpy()}


def text_layer(sparse: Path, tokens: int) -> tuple[Arrays, Arrays]:
    """The same of a layer of the text encoder; two tokens at the end are padding."""
    import torch
    from transformers import Qwen3ForCausalLM

    from d2m.model.components import empty_model
    from export.text.decoder import MASKED

    model: Any = empty_model(sparse / "text_encoder", Qwen3ForCausalLM)
    layer = model.get_submodule(LAYER)
    filled(layer, sparse / "text_encoder", LAYER)
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(1, tokens, model.config.hidden_size, generator=draw)
    hidden = torch.ones(tokens, tokens).triu(1)
    hidden[:, -2:] = 1
    rope = type(model.model.rotary_emb)(model.config)
    cos, sin = rope(states, torch.arange(tokens)[None])
    masks = (hidden.bool().logical_not()[None, None], -MASKED * hidden[None, None])
    with torch.no_grad():
        after = layer(states, attention_mask=masks[0], position_embeddings=(cos, sin))
    given = {"hidden_states": states, "bias": masks[1], "seen": torch.ones(1, tokens, 1)}
    given |= {"rope_cos": cos, "rope_sin": sin}
    return {name: each.numpy() for name, each in given.items()}, {"hidden_states": after.numpy()}


def filled(module: Any, folder: Path, name: str) -> None:
    """Give a module on the meta device its weights of a checkpoint, in float32."""
    from export.checkpoint.weights import Checkpoint

    checkpoint = Checkpoint(folder)
    state = {key: checkpoint.get(f"{name}.{key}").float() for key, _ in module.named_parameters()}
    module.load_state_dict(state, strict=False, assign=True)


def run(bundle: Path, component: str, kind: str, prefix: str, given: Mapping[str, Any]) -> Arrays:
    """One block of the bundle on the same inputs."""
    from runtime.bundle.directory import open_bundle
    from runtime.ort.component import Blocks

    opened = open_bundle(bundle, check="sizes")
    blocks = Blocks(opened, component, 1, offload="block")
    wanted = opened.component(component)["types"][kind]["inputs"]
    found: Arrays = blocks.block(kind, prefix, {name: given[name] for name in wanted})
    return found


if __name__ == "__main__":
    sys.exit(main())
