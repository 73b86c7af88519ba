"""VidTok's video tokenizers (Tang et al., arXiv 2412.13061) by diffusers."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vidtwin.autoencoder import TemporalSpec
from vidtwin.baselines.library.base import LibraryAutoencoder
from vidtwin.posteriors import Encoding, Latents, Quantized


class VidTok(LibraryAutoencoder):
    """VidTok's autoencoder, causal or not, with a Gaussian or with finite scalar quantization (FSQ).

    The library's defaults are KL, 4 x 8 x 8 pixels a place, 4 channels, causal: 157,451,663 parameters. A causal one
    takes 4k+1 frames: the first is repeated in front, so that it is a step by itself, and dropped after decoding. The
    library leaves the former to its caller. One that is not causal takes 16k frames.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_vidtok.AutoencoderVidTok"
    cache_attribute: ClassVar[str | None] = "causal_cache"

    def __init__(self, arguments: dict[str, Any] | None = None, activation_checkpointing: bool = False) -> None:
        super().__init__(arguments, activation_checkpointing)
        self.causal = bool(self.model.config.is_causal)
        if not self.causal:
            size = self.model.num_sample_frames_batch_size
            self.temporal = TemporalSpec(multiple=size, minimum=size, pad="last")

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return 2 ** len(self.model.encoder.tempo_ds), 2 ** len(self.model.encoder.spatial_ds)

    def _count_channels(self, config: Any) -> int:
        return int(config.z_channels)

    @property
    def last_layer(self) -> nn.Parameter:
        (*_, weight) = (weight for weight in self.model.decoder.conv_out.parameters() if weight.ndim > 1)
        return weight

    def _extend(self, clip: Tensor) -> Tensor:
        if not self.causal:
            return clip
        return torch.cat([clip[:, :, :1].expand(-1, -1, self.time - 1, -1, -1), clip], dim=2)

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        return super()._run_encoder(self._extend(clip))

    def _run_decoder(self, latent: Tensor) -> Tensor:
        decoded: Tensor = self.model.decode(latent)
        return decoded

    def _encode(self, clip: Tensor) -> Encoding:
        if self.model.regularizer == "kl":
            return super()._encode(clip)
        with self._call_library(clip.shape[2], clip.device):
            value, _ = self.model.encode(self._extend(clip))
        self._check_shape("encode", value, (len(clip), *self._latent_shapes((3, *clip.shape[2:]))["latent"]))
        # The library truncates the sum over digits, which rounding puts below the integer, to the code before.
        quantizer = self.model.regularization
        half = (quantizer._levels // 2).view(1, -1, 1, 1, 1)
        digits = (value.detach() * half + half).round().long()
        codes = (digits * quantizer._basis.view(1, -1, 1, 1, 1)).sum(dim=1)
        entry = self._look_up(codes, value)
        return Encoding(latent=Quantized(entry + (value - value.detach()), codes, int(quantizer.codebook_size)))

    def _look_up(self, codes: Tensor, like: Tensor) -> Tensor:
        entries: Tensor = self.model.regularization.indices_to_codes(codes)
        return entries.to(like.dtype)

    def code_shapes(self, clip_shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], int]]:
        if self.model.regularizer == "kl":
            return {}
        return {"latent": (self.latent_shapes(clip_shape)["latent"][1:], int(8**self.channels))}

    def dequantize(self, codes: Latents) -> Latents:
        """Look up integer codes latent (B, T', h, w) → the latent (B, C, T', h, w).

        Raises:
            UserError: The model has no codes, or their names, shapes or values are invalid.
        """
        if self.model.regularizer == "kl":
            return super().dequantize(codes)
        return {"latent": self._look_up(self._check_codes(codes, int(8**self.channels)), self.last_layer)}
