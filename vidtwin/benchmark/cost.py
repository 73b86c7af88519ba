"""What a model costs, counted without running it."""

import copy
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from vidtwin.autoencoder import VideoAutoencoder


@torch.no_grad()
def flops(model: VideoAutoencoder, clip_shape: Sequence[int]) -> dict[str, int]:
    """Floating-point operations of `encode` and `decode` for one clip (3, T, H, W); a multiply–add is two.

    Matrix products, convolutions and attention are counted, by PyTorch's own counter; additions, norms and activations
    are not. On the meta device, where nothing is computed: it shows the counter every product, also those that a CPU
    hides in fused kernels.
    """
    model = copy.deepcopy(model).to("meta").eval()
    clip = torch.empty(1, *clip_shape, device="meta")
    counts = {}
    with FlopCounterMode(display=False) as counter:
        latents = model.encode(clip).mode()
    counts["encode"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model.decode(latents, clip_shape[1])
    counts["decode"] = counter.get_total_flops()
    return counts
