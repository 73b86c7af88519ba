"""KVAE's causal video VAE by diffusers."""

from typing import Any, ClassVar

from torch import Tensor, nn

from vidtwin.baselines.library.base import LibraryAutoencoder, checkpoint_with_caches


class KVAE(LibraryAutoencoder):
    """KVAE's video autoencoder: 617,982,115 parameters, 16 channels, 4 x 8 x 8 pixels a place.

    The library drops the encoder's log-variance and puts 0 in its place, so that a sample has noise of deviation 1;
    here the latent is the mean, without noise. The library's recomputation of a block starts with the cache that the
    first run left, and gives other gradients without an error; here it starts with the one that the first run found.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_kvae_video.AutoencoderKLKVAEVideo"

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return int(config.temporal_compress_times), 2 ** (len(config.ch_mult) - 1)

    def _count_channels(self, config: Any) -> int:
        return int(config.z_channels)

    def _enable_checkpointing(self) -> None:
        self.model.enable_gradient_checkpointing(_checkpoint_block)

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model.encode(clip).latent_dist.mean, None


def _checkpoint_block(
    block: nn.Module, x: Tensor, embedding: Tensor | None, cache: dict[str, Any], *rest: Tensor
) -> Any:
    """Checkpoint a block that is given its cache: nested dictionaries, which it changes."""

    def write(values: dict[str, Any]) -> None:
        _copy_into(cache, values)

    return checkpoint_with_caches(block, (x, embedding, cache, *rest), lambda: _copy_into({}, cache), write)


def _copy_into(target: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Copy nested dictionaries, not the tensors in them, into `target` → `target`."""
    for key, value in source.items():
        target[key] = _copy_into(target.get(key, {}), value) if isinstance(value, dict) else value
    return target
