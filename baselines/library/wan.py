"""Wan 2.1's and 2.2's causal 3-D VAEs (Wan team, arXiv 2503.20314) by diffusers."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidtwin.baselines.library.base import LibraryAutoencoder


class Wan(LibraryAutoencoder):
    """Wan's autoencoder: 2.1 (126,892,531 parameters, 4 x 8 x 8 pixels a place) or 2.2 (704,688,668, 4 x 16 x 16).

    The library's networks run on the first frame, then on four at a time, and hand on the last frames of each layer.
    Here those are values, not attributes of the model as in the library: nothing of a clip stays, and a chunk can be
    recomputed. Evaluation clamps to [-1, 1] as the library does; training does not, since a clamp stops gradients.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_wan.AutoencoderKLWan"
    last_weight: ClassVar[str] = "decoder.conv_out.weight"

    def __init__(self, arguments: dict[str, Any] | None = None, activation_checkpointing: bool = False) -> None:
        super().__init__(arguments, activation_checkpointing)
        self.recomputes = activation_checkpointing

    def _enable_checkpointing(self) -> None:
        """Leave recomputation to `_run_chunks`: the library has none."""

    def _read_factors(self, config: Any) -> tuple[int, int]:
        pixels: int = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        return 2 ** sum(config.temperal_downsample), pixels

    def _count_channels(self, config: Any) -> int:
        return int(config.z_dim)

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        if size := self.model.config.patch_size:
            clip = _import_function("patchify")(clip, size)
        chunks = [clip[:, :, :1], *(clip[:, :, 1:].split(self.time, dim=2) if clip.shape[2] > 1 else ())]
        encoded = self._run_chunks(self.model.encoder, chunks)
        mean, logvar = self.model.quant_conv(encoded).chunk(2, dim=1)
        return mean, logvar

    def _run_decoder(self, latent: Tensor) -> Tensor:
        decoded = self._run_chunks(self.model.decoder, self.model.post_quant_conv(latent).split(1, dim=2), True)
        if size := self.model.config.patch_size:
            decoded = _import_function("unpatchify")(decoded, size)
        return decoded if self.training else decoded.clamp(-1.0, 1.0)

    def _run_chunks(self, network: nn.Module, chunks: Any, marks_first: bool = False) -> Tensor:
        """Run `network` on each chunk in turn and join its outputs in time.

        Args:
            network: Takes `feat_cache`, a list with an entry for each of its convolutions, and changes it.
            chunks: Each (B, C, t, h, w).
            marks_first: Tell the network which chunk is the first.
        """
        convolution = import_module(self.library_class.rpartition(".")[0]).WanCausalConv3d
        cache: list[Any] = [None] * sum(isinstance(module, convolution) for module in network.modules())

        def run(chunk: Tensor, first: bool, *before: Any) -> tuple[Any, ...]:
            after = list(before)
            extra = {"first_chunk": True} if first and marks_first else {}
            return network(chunk, feat_cache=after, feat_idx=[0], **extra), *after

        outputs = []
        for index, chunk in enumerate(chunks):
            if self.recomputes and torch.is_grad_enabled():
                output, *cache = checkpoint(run, chunk, index == 0, *cache, use_reentrant=False)
            else:
                output, *cache = run(chunk, index == 0, *cache)
            outputs.append(output)
        return torch.cat(outputs, dim=2)


def _import_function(name: str) -> Callable[[Tensor, int], Tensor]:
    """Import one of the library's functions between pixels and patches."""
    function: Callable[[Tensor, int], Tensor] = getattr(
        import_module("diffusers.models.autoencoders.autoencoder_kl_wan"), name
    )
    return function
