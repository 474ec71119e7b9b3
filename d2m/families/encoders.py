"""Sizes of the text encoders and VAEs of published models, beside their transformers.

Torch-free. Counted on the real classes with the published configs
(tests/d2m/families/test_encoders.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderSize:
    """Parameters of a text encoder or a VAE.

    params: all; bundled: those that a bundle has, and so a generation (a VAE's encoder and a vision
    tower are left out); largest: of its largest tensor; whole: whether export holds it in memory,
    else its weights are read one by one; widest: of a VAE, channels of the widest tensor of the
    image's own size, which the last doubling makes; layers: those that a bundle calls one by one,
    beside an embedding that is its largest tensor; 0 where it is one graph.
    """

    params: int
    bundled: int
    largest: int
    whole: bool = True
    widest: int = 0
    layers: int = 0

    def at_once(self, size: int) -> int:
        """What is in memory of `size` bytes where weights are streamed: all, or two layers."""
        if not self.layers:
            return size
        embedding = size * self.largest // self.bundled
        return embedding + 2 * (size - embedding) // self.layers


CLIP_L = EncoderSize(123_060_480, 123_060_480, 37_945_344)
CLIP_L_PROJECTED = EncoderSize(123_650_304, 123_650_304, 37_945_344)
CLIP_G = EncoderSize(694_659_840, 694_659_840, 63_242_240)  # OpenCLIP's bigG, with its projection
T5_XXL = EncoderSize(4_762_310_656, 4_762_310_656, 131_596_288, whole=False)  # the encoder
QWEN_VL = EncoderSize(8_292_166_656, 7_070_619_136, 544_997_376, whole=False)  # Qwen2.5-VL 7B
# Language models, of which the states after 27 layers (Qwen3) and 30 (Mistral 3) are read
QWEN3_4B = EncoderSize(4_022_468_096, 3_114_088_192, 388_956_160, whole=False, layers=27)
QWEN3_4B_35 = EncoderSize(4_022_468_096, 3_921_534_720, 388_956_160, whole=False, layers=35)
QWEN3_8B = EncoderSize(8_190_735_360, 5_831_883_520, 622_329_856, whole=False, layers=27)
MISTRAL_3 = EncoderSize(24_011_361_280, 17_343_754_240, 671_088_640, whole=False, layers=30)
# AutoencoderKL of 16 channels: FLUX.1, SD3; of 4: SDXL's, which PixArt-Sigma has
VAE_16 = EncoderSize(83_819_683, 49_545_475, 2_359_296, widest=256)
VAE_4 = EncoderSize(83_653_863, 49_490_199, 2_359_296, widest=256)
VAE_QWEN = EncoderSize(126_892_531, 71_524_595, 3_981_312, widest=192)
VAE_FLUX2 = EncoderSize(84_046_115, 49_620_259, 2_359_296, widest=256)  # of 32 channels
