"""LTX-Video's (HaCohen et al., arXiv 2501.00103) and LTX-2's autoencoders by diffusers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidtwin.baselines.library.base import LibraryAutoencoder
from vidtwin.baselines.library.neighbourhood import NeighbourhoodProcessor
from vidtwin.errors import UserError


class LTXVideo(LibraryAutoencoder):
    """LTX-Video's autoencoder: 419,193,649 parameters, 128 channels, 8 x 32 x 32 pixels a place.

    Shift and scale of the latent are buffers of the library's model, which official weights bring. A decoder with
    `timestep_conditioning` (from 0.9.1 on) decodes at time 0, as the library's pipeline does by default. One with
    `decoder_inject_noise` (0.9.1) adds noise to its features; evaluation draws it from seed 0, so that a latent has one
    clip.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_ltx.AutoencoderKLLTXVideo"

    def _read_factors(self, config: Any) -> tuple[int, int]:
        halvings = 2 ** sum(config.spatio_temporal_scaling)
        return config.patch_size_t * halvings, config.patch_size * halvings

    def _get_scaling(self, steps: int) -> tuple[Tensor, Tensor]:
        shift, scale = (each.view(1, -1, 1, 1, 1) for each in (self.model.latents_mean, self.model.latents_std))
        return shift, scale / self.model.config.scaling_factor

    def _run_decoder(self, latent: Tensor) -> Tensor:
        conditioned = self.model.config.timestep_conditioning
        moment = torch.zeros(latent.shape[0], device=latent.device, dtype=latent.dtype) if conditioned else None
        with self._fix_noise(latent.device):
            decoded: Tensor = self.model.decode(latent, moment).sample
        return decoded

    @contextmanager
    def _fix_noise(self, device: torch.device) -> Iterator[None]:
        """Draw what the block draws at random from seed 0 in evaluation, and restore the random state afterwards."""
        injected = self.model.config.decoder_inject_noise
        if self.training or not (injected if isinstance(injected, bool) else any(injected)):
            yield
            return
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.random.default_generator.manual_seed(0)
            for each in devices:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(0)
            yield


class LTX2Video(LTXVideo):
    """LTX-2's autoencoder, 128 channels, 8 x 32 x 32 pixels a place, with either of its decoders of one latent.

    With the convolutional one it has 1,222,479,601 parameters. The diffusion decoder of LTX-2.5 makes features of the
    clip's size from the latent, and pixels from noise with these, by neighbourhood attention: in one step as released.
    Evaluation draws the noise from `seed`, the same for each clip of a batch; training draws it anew.

    The library's class says 16 frames and 64 pixels a place, from the number of its stages; two of the four halve only
    one of the two.

    Args:
        arguments: Arguments of `AutoencoderKLLTX2Video` by name.
        activation_checkpointing: Recompute the library's blocks in the backward pass.
        decoder: "convolution" or "diffusion".
        decoder_arguments: Arguments of `LTX2VideoDiffusionDecoderModel` by name.
        sampling_steps: Steps from noise to pixels of the diffusion decoder.
        seed: Of its noise in evaluation.

    Raises:
        UserError: The library is missing, or refuses the arguments, or the decoder is of another latent.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_ltx2.AutoencoderKLLTX2Video"
    diffusion_class: ClassVar[str] = (
        "diffusers.models.autoencoders.ltx2_diffusion_decoder.LTX2VideoDiffusionDecoderModel"
    )

    def __init__(
        self,
        arguments: dict[str, Any] | None = None,
        activation_checkpointing: bool = False,
        decoder: Literal["convolution", "diffusion"] = "convolution",
        decoder_arguments: dict[str, Any] | None = None,
        sampling_steps: int = 1,
        seed: int = 0,
    ) -> None:
        if decoder not in ("convolution", "diffusion"):
            raise UserError(f'Expected decoder "convolution" or "diffusion", got {decoder!r}.')
        if decoder == "convolution" and decoder_arguments:
            raise UserError("Expected decoder_arguments with decoder diffusion alone, got decoder convolution.")
        if sampling_steps < 1:
            raise UserError(f"Expected sampling_steps of at least 1, got {sampling_steps}.")
        super().__init__(arguments, activation_checkpointing)
        self.sampling_steps, self.seed = sampling_steps, seed
        self.diffusion: Any = None
        if decoder == "diffusion":
            del self.model.decoder
            self.diffusion = self._build_diffusion(decoder_arguments or {}, activation_checkpointing)
            places, self.minimum_side = self._find_minimum(0), self.space * max(map(self._find_minimum, (1, 2)))
            self.temporal = replace(self.temporal, minimum=self._count_frames(places))
        elif self.model.config.decoder_spatial_padding_mode == "reflect":
            self.minimum_side = 2 * self.space

    def _build_diffusion(self, arguments: dict[str, Any], activation_checkpointing: bool) -> Any:
        diffusion = self._build(arguments, self.diffusion_class)
        strides, patch = diffusion.config.decoder_upsample_strides, diffusion.config.patch_size
        times, *spaces = (math.prod(factors) for factors in zip(*strides, strict=True))
        found = (diffusion.config.latent_channels, times, *(space * patch for space in spaces))
        if found != (self.channels, self.time, self.space, self.space):
            raise UserError(
                f"Expected a decoder of {self.channels} channels and {self.time} x {self.space} x {self.space} pixels, "
                f"got {found[0]} and {' x '.join(map(str, found[1:]))}; correct decoder_arguments."
            )
        diffusion.set_attn_processor(NeighbourhoodProcessor())
        if activation_checkpointing:  # the library has none
            for block in (*chain.from_iterable(diffusion.decoder.det_stages), *diffusion.decoder.diff_blocks):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return diffusion

    def _find_minimum(self, axis: int) -> int:
        """Return the least number of steps (axis 0) or places (1, 2) that the diffusion decoder takes."""
        return next(places for places in count(1) if self._holds_kernels(axis, places))

    def _holds_kernels(self, axis: int, places: int) -> bool:
        """Return whether the grid of each stage of the diffusion decoder is at least as long as its kernel."""
        config = self.diffusion.config
        padding = self.diffusion.decoder.trailing_pad_latent_frames if axis == 0 else 0
        size = places + padding
        for kernel, stride in zip(config.decoder_stage_kernels, config.decoder_upsample_strides, strict=True):
            if size < kernel[axis]:
                return False
            size = size * stride[axis] - (axis == 0 and stride[axis] == 2)  # the first frame stays one frame
        return bool(size - padding * self.time >= config.decoder_stage5_kernel[axis])

    def _read_factors(self, config: Any) -> tuple[int, int]:
        kinds = config.downsample_type
        time = config.patch_size_t * 2 ** sum(kind in ("temporal", "spatiotemporal") for kind in kinds)
        return time, config.patch_size * 2 ** sum(kind in ("spatial", "spatiotemporal") for kind in kinds)

    @property
    def last_layer(self) -> nn.Parameter:
        return super().last_layer if self.diffusion is None else self.diffusion.get_parameter("decoder.conv_out.weight")

    def _run_decoder(self, latent: Tensor) -> Tensor:
        if self.diffusion is None:
            return super()._run_decoder(latent)
        least = [self._find_minimum(axis) for axis in range(3)]
        if any(size < minimum for size, minimum in zip(latent.shape[2:], least, strict=True)):
            raise UserError(
                f"Expected a latent of at least {' x '.join(map(str, least))} places for the diffusion decoder, got "
                f"{' x '.join(map(str, latent.shape[2:]))}."
            )
        generators = None if self.training else [torch.Generator().manual_seed(self.seed) for _ in latent]
        decoded: Tensor = self.diffusion.decode(latent, generators, self.sampling_steps).sample
        return decoded

    @classmethod
    def from_official(
        cls,
        path: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        decoder: Literal["convolution", "diffusion"] = "convolution",
        decoder_subfolder: str = "diffusion_decoder",
        sampling_steps: int = 1,
        seed: int = 0,
    ) -> Self:
        """Load official weights in the library's form: config.json and .safetensors files. No code is run.

        Args:
            path: A folder, or an id on the Hugging Face Hub (owner/name), which is downloaded.
            subfolder: The autoencoder's folder inside of it, such as vae.
            revision: Branch, tag or commit on the Hub.
            decoder: As in the constructor.
            decoder_subfolder: The diffusion decoder's folder inside of `path`.
            sampling_steps: As in the constructor.
            seed: As in the constructor.

        Raises:
            UserError: Files are missing, or are those of another class or size.
        """
        if decoder != "diffusion":
            return super().from_official(path, subfolder, revision)
        folder = cls._find_folder(path, subfolder, revision)
        decoder_folder = cls._find_folder(path, decoder_subfolder, revision)
        arguments, state = cls._read_official(folder)
        decoder_arguments, decoder_state = cls._read_official(decoder_folder, cls.diffusion_class)
        model = cls(arguments, False, decoder, decoder_arguments, sampling_steps, seed)
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.")}
        model._load_official(model.model, kept, folder)
        model._load_official(model.diffusion, decoder_state, decoder_folder)
        return model.eval()
