"""Tiny but genuine FLUX.2 pipelines: [klein] distilled and base, [dev].

Their language models have as many layers as the pipelines' own choice of hidden states needs, one
more than the last that is read, and chat templates of the published kind.
"""

from __future__ import annotations

from typing import Any

from tests.tiny.pipeline import IMAGE_SIZE, WORDS, randomize

FLUX2_CONFIG = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * 24,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
LENGTH = 24  # text tokens, the template's among them
DECODER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,  # TensorRT-RTX fuses none of 8
    "max_position_embeddings": 64,
}
# The published templates' way with one message, written anew: what stands around it, and a part
# that the pipelines' arguments leave out.
QWEN3_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
MISTRAL_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- set text = message.content if message.content is string else message.content[0].text %}"
    "{%- if message.role == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + text.split()[0] + '[/SYSTEM_PROMPT]' }}"
    "{%- else %}{{- '[INST]' + text + '[/INST]' }}{%- endif %}{%- endfor %}"
)


def byte_pairs(words: list[str], first: list[str], letters: str) -> tuple[dict[str, int], list]:
    """A byte-pair vocabulary with a token for every word, with and without a space before it."""
    ranks: dict[tuple[str, str], int] = {}
    for word in (form for each in words for form in (each, "\u0120" + each)):
        parts = list(word)
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            at = list(zip(parts, parts[1:])).index(best)
            parts[at : at + 2] = ["".join(best)]
        while len(parts) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
            parts[:2] = [parts[0] + parts[1]]
    pieces = [*sorted(set(letters)), *dict.fromkeys("".join(pair) for pair in ranks)]
    return {piece: index for index, piece in enumerate([*first, *pieces])}, list(ranks)


LETTERS = "abcdefghijklmnopqrstuvwxyzDAY0123456789,.:-'\u0120\u010a"


def qwen3_tokenizer() -> Any:
    """A real Qwen2 byte-pair tokenizer with Qwen3's tokens and a chat template."""
    from transformers import Qwen2Tokenizer

    vocab, merges = byte_pairs(["user", "assistant", *WORDS], ["<|endoftext|>"], LETTERS)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=LENGTH,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = QWEN3_TEMPLATE
    return tokenizer


def mistral_tokenizer(side: str = "left") -> Any:
    """A real byte-pair tokenizer with Mistral's tokens, expression and a chat template.

    side: where padding goes; the published one's is the left.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from runtime.bundle.tokenizer_file import TEKKEN

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    special += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>", "[IMG]"]
    vocab, merges = byte_pairs(["You", *WORDS], special, LETTERS)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TEKKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[each for each in special if each[0] == "["],
        padding_side=side,
        model_max_length=LENGTH,
        chat_template=MISTRAL_TEMPLATE,
    )


def flux2_vae() -> Any:
    """Four channels, patched to sixteen, with statistics that are neither zero nor one."""
    import torch
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
    )
    draw = torch.Generator().manual_seed(9)
    vae.bn.running_mean.copy_(0.3 * torch.randn(16, generator=draw))
    vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=draw))
    return randomize(vae, 1).eval()


def scheduler() -> Any:
    """FLUX.1 [dev]'s, which diffusers' conversion gives FLUX.2 too (read)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def flux2_transformer(**more: Any) -> Any:
    from diffusers import Flux2Transformer2DModel

    return randomize(Flux2Transformer2DModel(**{**FLUX2_CONFIG, **more}), 0).eval()


def klein(distilled: bool = True) -> Any:
    """[klein]: Qwen3 with 28 layers, of which 27 are read; no guidance embedding."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen3_tokenizer()
    config = Qwen3Config(
        **DECODER, vocab_size=len(tokenizer), num_hidden_layers=28, tie_word_embeddings=True
    )
    return Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=flux2_vae(),
        text_encoder=randomize(Qwen3ForCausalLM(config), 2).eval(),
        tokenizer=tokenizer,
        transformer=flux2_transformer(),
        is_distilled=distilled,
    )


def klein_kv() -> Any:
    """[klein] KV: keys and values of reference tokens are kept from step to step."""
    from diffusers import Flux2KleinKVPipeline

    return Flux2KleinKVPipeline(**klein().components)


def klein_base() -> Any:
    """[klein] base: guided by a negative prompt."""
    return klein(distilled=False)


def flux2_dev() -> Any:
    """[dev]: Mistral 3 with 31 layers, of which 30 are read; guidance is embedded."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokenizer = mistral_tokenizer()
    text = {"model_type": "mistral", **DECODER, "vocab_size": len(tokenizer)}
    text |= {"num_hidden_layers": 31, "sliding_window": None}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    vision |= {"patch_size": 4, "image_size": 16}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=8)
    return Flux2Pipeline(
        scheduler=scheduler(),
        vae=flux2_vae(),
        text_encoder=randomize(Mistral3ForConditionalGeneration(config), 2).eval(),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=True),
    )
