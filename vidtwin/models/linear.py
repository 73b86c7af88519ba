"""Initial values with which VidTwin starts as a linear code through its shortcuts ("linear").

The shortcuts of `vidtwin.models.shortcut` average features and repeat latents without parameters, so the patch
embedding and the decoder's last layer alone decide what comes through. Here channel group g of the structure shortcut
starts with the g-th atom of a discrete cosine transform of the patch (Ahmed et al. 1974), lowest frequencies first, and
the last layer starts with its transpose. The principal components of patches of natural images are close to these
atoms, so the model starts near the best linear code of its size. It stays free to leave it: nothing is frozen.

A number of the latent is SCALE / (√3 · p) · √(1 + u² + v²) times the coefficient of an atom of frequencies (u, v): the
spectrum of natural images falls with the square of the frequency, so all numbers are of about the same size, and that
of a uniform patch is SCALE times its luma.
"""

import math

import torch
from torch import Tensor, nn

from vidtwin.models.branches import DynamicsBranch, StructureBranch
from vidtwin.models.transformer import Decoder, Encoder

# A grey patch becomes SCALE times its value: large compared to the sampling noise (0.05) and to what the shortcut
# averages of the encoder's position embedding (0.1), but not to the decoder's position embedding (0.7): the layer norms
# divide by the size of embedding and signal together, so a larger signal loses its contrast.
SCALE = 4.0
# Chroma varies less than luma: its atoms come after those of luma of so many times the squared frequency.
_CHROMA = 6.0
# Luma and two axes of chroma, orthonormal.
_COLOURS = ((1, 1, 1), (1, 0, -1), (1, -2, 1))
# Size of position embedding (√½) and signal of a usual patch, by which the decoder's layer norms divide: the last layer
# restores it, so that real clips start with their contrast (docs/health.md).
_FEATURE_SIZE = 0.85
# Factors of the random initial values beside the linear code: they would cover it.
_NOISE = 0.05
_BRANCHES = 0.1


def dct_atoms(patch_size: int, number: int) -> tuple[Tensor, Tensor]:
    """Return atoms of the orthonormal DCT of a patch, in order of frequency, and the size of their coefficients.

    Returns:
        Atoms (N, 3, p, p), N = min(`number`, 3·p²), and the standard deviation of a coefficient relative to that of the
        first (N,).
    """
    place = torch.arange(patch_size, dtype=torch.float64)
    basis = torch.cos(math.pi / patch_size * torch.outer(place, place + 0.5))
    basis = basis / basis.norm(dim=1, keepdim=True)
    colours = torch.tensor(_COLOURS, dtype=torch.float64)
    colours = colours / colours.norm(dim=1, keepdim=True)
    ordered = sorted(
        ((1 + u * u + v * v) * (_CHROMA if colour else 1), u, v, colour)
        for u in range(patch_size)
        for v in range(patch_size)
        for colour in range(len(_COLOURS))
    )[:number]
    atoms = [torch.einsum("k,i,j->kij", colours[colour], basis[u], basis[v]) for _, u, v, colour in ordered]
    falls = torch.tensor([cost for cost, *_ in ordered], dtype=torch.float64).rsqrt()
    return torch.stack(atoms).float(), falls.float()


@torch.no_grad()
def initialize(
    encoder: Encoder, decoder: Decoder, structure: StructureBranch, dynamics: DynamicsBranch, groups: Tensor
) -> None:
    """Set the first and last layer so that they pass the DCT of each patch, and shrink the branches' outputs.

    Args:
        encoder: Its patch embedding is set.
        decoder: Its last layer and modulation are set.
        structure: Its latent's mean and its features start at a tenth.
        dynamics: Its latent's mean and its features start at a tenth.
        groups: Channel weights of the structure shortcut (G, C).
    """
    patch = encoder.patch_size
    atoms, sizes = dct_atoms(patch, groups.shape[0])
    groups = groups[: len(atoms)]
    scales = SCALE / (math.sqrt(3) * patch) / sizes
    # Averaging C_g channels of ±1/√|C_g| gives the coefficient; the decoder sees it |C_g| times.
    inward = torch.einsum("gc,gkij->ckij", groups, atoms * scales[:, None, None, None])
    outward = torch.einsum("gc,gkij->ijkc", groups.square() * groups.sign(), atoms / scales[:, None, None, None])
    for layer, values in ((encoder.patch_embed, inward.flatten(1)), (decoder.linear, outward.flatten(0, 2))):
        layer.weight.mul_(_NOISE).add_(values * (_FEATURE_SIZE if layer is decoder.linear else 1))
    nn.init.zeros_(decoder.modulation)
    embed = dynamics.embed[2]
    assert isinstance(embed, nn.Linear)
    for output in (structure.head, structure.conv_out, dynamics.head, embed):
        output.weight.mul_(_BRANCHES)
