"""LPIPS on frames, with a backbone from an explicit file or torch hub's cache, never with random weights."""

import os
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lpips
import torch
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.errors import UserError
from vidtwin.losses.frame_distance import FrameDistance

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


class LPIPS(FrameDistance):
    """Learned perceptual distance of frames (Zhang et al. 2018), version 0.1; VGG-16 is that of the released code.

    Distances of different networks are different metrics: WF-VAE had 0.018 with AlexNet and 0.079 with VGG-16.

    Args:
        backbone: File with torchvision's weights of the network (.pth or .safetensors); None is `default_backbone()`.
        net: VGG-16 or AlexNet.
        spatial: Resize each layer's map to the frame's size (bilinear) before averaging, as Open-Sora-Plan does: border
            values of small maps then count more.
    """

    key = "perceptual"

    def __init__(self, backbone: str | os.PathLike[str] | None = None, net: Net = "vgg", spatial: bool = False) -> None:
        if net not in BACKBONES:
            raise UserError(f"Expected the network of LPIPS to be one of {', '.join(BACKBONES)}, got {net!r}.")
        super().__init__(f"LPIPS with {BACKBONES[net].name}", BACKBONES[net].smallest)
        self.backbone = backbone
        self.net = net
        self.spatial = spatial

    def design(self) -> nn.Module:
        return _design(self.net, self.spatial)

    def _build(self, download: bool) -> nn.Module:
        """Download the default file (528 MB, AlexNet's 233 MB) if it is missing, unless VIDTWIN_OFFLINE is set."""
        path = Path(self.backbone) if self.backbone is not None else default_backbone(self.net)
        backbone = BACKBONES[self.net]
        if not path.is_file():
            if self.backbone is not None or not download or os.environ.get("VIDTWIN_OFFLINE"):
                raise UserError(_missing_message(backbone, path))
            _download(backbone, path)
        return _build(self.net, self.spatial, weights.read(path), path)

    def _distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        distances = super()._distances(prediction, target)  # (N, 1, 1, 1), or maps (N, 1, H, W)
        return distances.flatten(1).mean(1) if self.spatial else distances.flatten()


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
    network = _design(net, spatial)
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
    return network


def _design(net: Net, spatial: bool) -> nn.Module:
    """Build the network on the meta device."""
    with warnings.catch_warnings(), torch.device("meta"):
        # The meta device allocates and draws nothing: the lpips package builds the whole network, including up to 124
        # million classifier weights, by a torchvision call that warns.
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, spatial=spatial, pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    return network
