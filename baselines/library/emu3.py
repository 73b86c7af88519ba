"""EMU-3's vision tokenizer (Wang et al., arXiv 2409.18869) by transformers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

from vidtwin.baselines.library.base import LibraryAutoencoder
from vidtwin.posteriors import Encoding, Latents, Quantized


class Emu3(LibraryAutoencoder):
    """EMU-3's tokenizer: 270,740,287 parameters, 4 channels, 4 x 8 x 8 pixels a code of 15 bits, clips of 4k frames.

    Only the decoder trains. The library's quantizer is an argmin without a straight-through gradient or a loss, so no
    gradient reaches the encoder; encoder and codebook are frozen, and codes on disk stay valid. The batch norms keep
    the statistics of the weights in training too.

    Args:
        arguments: Arguments of `Emu3VQVAEConfig` by name.
        activation_checkpointing: Not supported by the library; must be false.
    """

    library_class: ClassVar[str] = "transformers.models.emu3.modeling_emu3.Emu3VQVAE"
    last_weight: ClassVar[str] = "decoder.conv_out.weight"
    causal = False

    def __init__(self, arguments: dict[str, Any] | None = None, activation_checkpointing: bool = False) -> None:
        super().__init__(arguments, activation_checkpointing)
        for part in (self.model.encoder, self.model.quant_conv, self.model.quantize):
            part.requires_grad_(False)

    @classmethod
    def _config_class(cls) -> Any:
        return import_module("transformers.models.emu3.configuration_emu3").Emu3VQVAEConfig

    @classmethod
    def _argument_names(cls, library: Any) -> list[str]:
        return sorted(cls._config_class().__annotations__)

    @classmethod
    def _construct(cls, library: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
        return library(cls._config_class()(**arguments))

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return int(config.temporal_downsample_factor), 2 ** (len(config.channel_multiplier) - 1)

    def _count_channels(self, config: Any) -> int:
        return int(config.embed_dim)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.model.eval()
        return self

    def _encode(self, clip: Tensor) -> Encoding:
        # The library's encode() wants sizes of the pictures as a tensor, and crops the codes by them on other axes.
        features = self.model.encoder(clip.transpose(1, 2))
        features = self.model.quant_conv(features.transpose(1, 2))
        codes = self._find_codes(features.transpose(1, 2))
        value = self._look_up(codes)
        self._check_shape("encode", value, (len(clip), *self._latent_shapes((3, *clip.shape[2:]))["latent"]))
        return Encoding(latent=Quantized(value, codes, self.model.config.codebook_size))

    def _find_codes(self, features: Tensor) -> Tensor:
        """Return the code of the nearest entry for each vector of (B, T', C, h, w), (B, T', h, w).

        In the precision of the codebook: products in bfloat16 would give another entry. Clip by clip, since the library
        holds the distance to each of its entries.
        """
        features = features.to(self.model.quantize.embedding.weight.dtype)
        device = features.device.type
        with torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext():
            return torch.cat([self.model.quantize(clip) for clip in features.split(1)])

    def _run_decoder(self, latent: Tensor) -> Tensor:
        # The library's decode() takes codes alone; generators of latents give vectors.
        inner = self.model.post_quant_conv(latent).transpose(1, 2)
        frames = self.model.decoder(inner, latent.transpose(1, 2))
        return frames.unflatten(0, (latent.shape[0], -1)).transpose(1, 2)

    def _look_up(self, codes: Tensor) -> Tensor:
        return self.model.quantize.embedding(codes).movedim(-1, 1)

    def code_shapes(self, clip_shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], int]]:
        return {"latent": (self.latent_shapes(clip_shape)["latent"][1:], self.model.config.codebook_size)}

    def dequantize(self, codes: Latents) -> Latents:
        """Look up integer codes latent (B, T', h, w) → the latent (B, C, T', h, w).

        Raises:
            UserError: Names, shapes or values of the codes are invalid.
        """
        return {"latent": self._look_up(self._check_codes(codes, self.model.config.codebook_size))}
