"""LPIPS on frames, with a backbone from an explicit file or torch hub's cache, never with random weights."""

import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lpips
import torch
from einops import rearrange
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.errors import UserError

Net = Literal["vgg", "alex"]

_HEADS = Path(lpips.__file__).parent / "weights" / "v0.1"


@dataclass(frozen=True)
class _Backbone:
    name: str
    file: str  # torchvision's IMAGENET1K_V1; the part after the last hyphen begins its SHA-256
    smallest: int  # side in pixels that the layers need

    @property
    def url(self) -> str:
        return f"https://download.pytorch.org/models/{self.file}"


BACKBONES: dict[str, _Backbone] = {
    "vgg": _Backbone("VGG-16", "vgg16-397923af.pth", 16),
    "alex": _Backbone("AlexNet", "alexnet-owt-7be5be79.pth", 31),
}


def default_backbone(net: Net = "vgg") -> Path:
    """Return the path where torch hub caches torchvision's weights (IMAGENET1K_V1) of the network."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net].file


class LPIPS:
    """Learned perceptual distance of frames (Zhang et al. 2018), version 0.1; VGG-16 is that of the released code.

    Distances of different networks are different metrics: WF-VAE had 0.018 with AlexNet and 0.079 with VGG-16.

    Not an `nn.Module`, so that no module registers it: the network is frozen, and registered it would enter every
    checkpoint (59 MB), the optimizer's and DDP's parameters, and `train()` would enable its dropout. Instead it moves
    to the input's device.

    Args:
        backbone: File with torchvision's weights of the network (.pth or .safetensors); None is `default_backbone()`.
        net: VGG-16 or AlexNet.
        spatial: Resize each layer's map to the frame's size (bilinear) before averaging, as Open-Sora-Plan does: border
            values of small maps then count more.
    """

    def __init__(self, backbone: str | os.PathLike[str] | None = None, net: Net = "vgg", spatial: bool = False) -> None:
        if net not in BACKBONES:
            raise UserError(f"Expected the network of LPIPS to be one of {', '.join(BACKBONES)}, got {net!r}.")
        self.backbone = backbone
        self.net = net
        self.spatial = spatial
        self.network: nn.Module | None = None

    def load(self, download: bool = True) -> None:
        """Read the weights unless they are loaded.

        Args:
            download: Download the default file (528 MB, AlexNet's 233 MB) if it is missing, unless VIDTWIN_OFFLINE is
                set.

        Raises:
            UserError: The file is missing or does not fit the network.
        """
        if self.network is None:
            path = Path(self.backbone) if self.backbone is not None else default_backbone(self.net)
            backbone = BACKBONES[self.net]
            if not path.is_file():
                if self.backbone is not None or not download or os.environ.get("VIDTWIN_OFFLINE"):
                    raise UserError(_missing_message(backbone, path))
                _download(backbone, path)
            self.network = _build(self.net, self.spatial, weights.read(path), path)

    def allowed(self, height: int, width: int) -> str | None:
        """Return why frames of this size in pixels are too small for the network, or None."""
        backbone = BACKBONES[self.net]
        if min(height, width) >= backbone.smallest:
            return None
        side = f"{backbone.smallest}x{backbone.smallest}"
        return f"Expected frames of at least {side} pixels for LPIPS with {backbone.name}, got {(height, width)}."

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compare clips (B, 3, T, H, W) or frames (N, 3, H, W) in [-1, 1]: one distance per frame, (B·T,) or (N,)."""
        reason = self.allowed(*prediction.shape[-2:])
        if reason:
            raise UserError(reason)
        # The first call may be in inference mode (validation); weights created there can't be used in training.
        with torch.inference_mode(False):
            self.load()
            assert self.network is not None
            self.network.to(prediction.device)
        if prediction.ndim == 5:
            prediction = rearrange(prediction, "b c t h w -> (b t) c h w")
            target = rearrange(target, "b c t h w -> (b t) c h w")
        if torch.is_grad_enabled():
            return self._distances(prediction, target)
        return torch.cat([self._distances(*frames) for frames in _split_frames(prediction, target)])

    def _distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        assert self.network is not None
        distances: Tensor = self.network(prediction.float(), target.float())  # (N, 1, 1, 1), or maps (N, 1, H, W)
        return distances.flatten(1).mean(1) if self.spatial else distances.flatten()


def _split_frames(*clips: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split (N, 3, H, W) into batches of few frames, for passes without a backward pass.

    For 16 frames of 224 px this halves the time on a CPU, whose caches then hold VGG's maps; on a GPU it saves memory.
    """
    on_cpu = clips[0].device.type == "cpu"
    number = max(1, (2**17 if on_cpu else 2**20) // clips[0][0, 0].numel())
    layout = torch.channels_last if on_cpu else torch.preserve_format
    return zip(*(clip.contiguous(memory_format=layout).split(number) for clip in clips), strict=True)


def _missing_message(backbone: _Backbone, path: Path, why: str = "") -> str:
    return (
        f"Expected the {backbone.name} backbone of LPIPS at {path}, got no such file{why}; "
        f"download it from {backbone.url}."
    )


def _download(backbone: _Backbone, path: Path) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10.0)  # do not hang on a machine whose network drops packets
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(backbone.url, str(path), hash_prefix=digest)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(_missing_message(backbone, path, f" and could not fetch it ({reason})")) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _build(net: Net, spatial: bool, backbone: Any, path: Path) -> nn.Module:
    name = BACKBONES[net].name
    if not isinstance(backbone, dict):
        raise UserError(f"Expected a state dict of {name} in {path}, got {type(backbone).__name__}.")
    with warnings.catch_warnings(), torch.device("meta"):
        # The meta device allocates and draws nothing: the lpips package builds the whole network, including up to 124
        # million classifier weights, by a torchvision call that warns.
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, spatial=spatial, pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    # net.slice1.0.weight in the lpips package is features.0.weight in torchvision
    names = {f"features.{key.split('.', 2)[2]}": key for key in network.state_dict() if key.startswith("net.")}
    given = {k: v for k, v in backbone.items() if isinstance(v, Tensor) and not k.startswith("classifier.")}
    wanted = {theirs: network.state_dict()[ours] for theirs, ours in names.items()}
    weights.check_fit(given, wanted, f"Expected torchvision's {name}, but {path}")
    heads = torch.load(_HEADS / f"{net}.pth", map_location="cpu", weights_only=True)
    loaded = {ours: given[theirs].float() for theirs, ours in names.items()} | heads
    network.load_state_dict(loaded, strict=False, assign=True)
    left = [key for key, tensor in network.state_dict().items() if tensor.is_meta]
    if left:
        raise RuntimeError(f"LPIPS tensors without a value: {left}; the lpips package has changed.")
    return network.requires_grad_(False).eval()
