"""Distances of frames by frozen networks: reading on first use, sizes, and batches of few frames."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vidtwin.errors import UserError
from vidtwin.losses.gradients import compute_with_gradient


class FrameDistance(ABC):
    """A distance of frames by a frozen pretrained network.

    Not an `nn.Module`, so that no module registers it: the network is frozen, and registered it would enter every
    checkpoint (59 MB for VGG-16), the optimizer's and DDP's parameters, and `train()` would enable its dropout.
    Instead it moves to the input's device.

    Args:
        title: Its name and its network's, for messages.
        smallest: Side in pixels that the layers need.

    Attributes:
        key: Name of the loss term in logs.
        network: From (prediction, target), (N, 3, H, W) in [-1, 1], to distances; None before it is read.
    """

    key: ClassVar[str]

    def __init__(self, title: str, smallest: int) -> None:
        self.title = title
        self.smallest = smallest
        self.network: nn.Module | None = None

    @abstractmethod
    def _build(self, download: bool) -> nn.Module:
        """Read the weights; raise `UserError` if they are missing or do not fit the network."""

    def design(self) -> nn.Module:
        """Build the network for what needs its shapes alone, with the trained values or with none (on the meta device).

        Raises:
            UserError: The network can't be built without its weights, and they are missing.
        """
        return self._build(download=False)

    def load(self, download: bool = True) -> None:
        """Read the weights unless they are loaded.

        Args:
            download: Allow a download of weights that have a default address.

        Raises:
            UserError: The weights are missing or do not fit the network.
        """
        if self.network is None:
            self.network = self._build(download).requires_grad_(False).eval()

    def unavailable(self, height: int, width: int) -> str | None:
        """Return the reason why the network takes no frames of this size in pixels, or None."""
        if min(height, width) >= self.smallest:
            return None
        side = f"{self.smallest}x{self.smallest}"
        return f"Expected frames of at least {side} pixels for {self.title}, got {(height, width)}."

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compare clips (B, 3, T, H, W) or frames (N, 3, H, W) in [-1, 1]: one distance per frame, (B·T,) or (N,).

        The gradient for the prediction is computed here, a few frames at a time.
        """
        reason = self.unavailable(*prediction.shape[-2:])
        if reason:
            raise UserError(reason)
        # The first call may be in inference mode (validation); weights created there can't be used in training.
        with torch.inference_mode(False):
            self.load()
            assert self.network is not None
            if any(weight.device != prediction.device for weight in self.network.parameters()):
                self.network.to(prediction.device)
        if prediction.ndim == 5:
            prediction = rearrange(prediction, "b c t h w -> (b t) c h w")
            target = rearrange(target, "b c t h w -> (b t) c h w")
        if target.requires_grad and torch.is_grad_enabled():
            return self._distances(prediction, target)
        return torch.cat(
            [
                compute_with_gradient(partial(self._distances, target=true), frames)
                for frames, true in _split_frames(prediction, target)
            ]
        )

    def _distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        assert self.network is not None
        distances: Tensor = self.network(prediction.float(), target.float())
        return distances


def normalize_channels(features: Tensor) -> Tensor:
    """Divide each position's feature vector, (N, C, H, W), by its length plus 1e-10, in fp32.

    The gradient of `vector_norm` at 0 is 0, so that a position without a feature gives no NaN.
    """
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _split_frames(*clips: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split (N, 3, H, W) into batches of few frames.

    For 16 frames of 224 px this halves the time on a CPU, whose caches then hold VGG's maps; on a GPU it saves memory.
    """
    on_cpu = clips[0].device.type == "cpu"
    number = max(1, (2**17 if on_cpu else 2**20) // clips[0][0, 0].numel())
    layout = torch.channels_last if on_cpu else torch.preserve_format
    return zip(*(clip.contiguous(memory_format=layout).split(number) for clip in clips), strict=True)
