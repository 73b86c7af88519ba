"""LPIPS on frames, with a VGG-16 backbone from a file: never downloaded behind one's back, never a random network."""

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import lpips
import torch
from einops import rearrange
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.errors import UserError

BACKBONE_FILE = "vgg16-397923af.pth"
BACKBONE_URL = f"https://download.pytorch.org/models/{BACKBONE_FILE}"
_HEADS_FILE = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"


def default_backbone() -> Path:
    """Where torch hub caches torchvision's VGG-16 (IMAGENET1K_V1)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE_FILE


class LPIPS:
    """Learned perceptual distance of frames (Zhang et al. 2018), version 0.1 with VGG-16 as in the released code.

    Not an `nn.Module`, so that no module that holds one registers it: the network is frozen, and registered it would
    enter every checkpoint (59 MB), the optimizer's and DDP's parameters, and `train()` would switch on its dropout.
    It follows the input to its device instead.

    Args:
        backbone: File with torchvision's VGG-16 weights (.pth or .safetensors); None is `default_backbone()`.
    """

    def __init__(self, backbone: str | os.PathLike[str] | None = None) -> None:
        self.backbone = backbone
        self.network: nn.Module | None = None

    def load(self, download: bool = True) -> None:
        """Read the weights, once.

        Args:
            download: Fetch the default file (528 MB) if it is absent; not done where VIDTWIN_OFFLINE is set.
        """
        if self.network is None:
            path = Path(self.backbone) if self.backbone is not None else default_backbone()
            if not path.is_file():
                if self.backbone is not None or not download or os.environ.get("VIDTWIN_OFFLINE"):
                    raise UserError(_absent(path))
                _download(path)
            self.network = _build(weights.read(path), path)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) or frames (N, 3, H, W) in [-1, 1] → one distance per frame, (B·T,) or (N,)."""
        # The first call may come from validation in inference mode; weights made there bar training.
        with torch.inference_mode(False):
            self.load()
            assert self.network is not None
            self.network.to(prediction.device)
        if prediction.ndim == 5:
            prediction = rearrange(prediction, "b c t h w -> (b t) c h w")
            target = rearrange(target, "b c t h w -> (b t) c h w")
        return self.network(prediction.float(), target.float()).flatten()


def _absent(path: Path, why: str = "") -> str:
    return f"Expected the VGG-16 backbone of LPIPS at {path}, got no such file{why}; download it from {BACKBONE_URL}."


def _download(path: Path) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10.0)  # a machine whose network swallows packets must not hang
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(BACKBONE_URL, str(path), hash_prefix=digest)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(_absent(path, f" and could not fetch it ({reason})")) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _build(backbone: Any, path: Path) -> nn.Module:
    if not isinstance(backbone, dict):
        raise UserError(f"Expected a state dict of VGG-16 in {path}, got {type(backbone).__name__}.")
    with warnings.catch_warnings(), torch.device("meta"):
        # On the meta device nothing is allocated or drawn: the lpips package builds the whole VGG-16, 124 million
        # weights of classifier included, and asks torchvision for it in a way that warns.
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    # net.slice1.0.weight in the lpips package is features.0.weight in torchvision
    names = {f"features.{name.split('.', 2)[2]}": name for name in network.state_dict() if name.startswith("net.")}
    given = {k: v for k, v in backbone.items() if isinstance(v, Tensor) and not k.startswith("classifier.")}
    wanted = {theirs: network.state_dict()[ours] for theirs, ours in names.items()}
    weights.check_fit(given, wanted, f"Expected torchvision's VGG-16, but {path}")
    heads = torch.load(_HEADS_FILE, map_location="cpu", weights_only=True)
    loaded = {ours: given[theirs].float() for theirs, ours in names.items()} | heads
    network.load_state_dict(loaded, strict=False, assign=True)
    left = [name for name, tensor in network.state_dict().items() if tensor.is_meta]
    if left:
        raise RuntimeError(f"LPIPS tensors without a value: {left}; the lpips package has changed.")
    return network.requires_grad_(False).eval()
