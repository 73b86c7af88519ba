"""The linear initial values: atoms against SciPy's DCT, and the code that the model starts with."""

import pytest
import torch
from scipy.fft import idctn

from vidtwin.models.linear import SCALE, dct_atoms
from vidtwin.models.vidtwin import VidTwin

SIZES = {
    "num_frames": 4,
    "resolution": 32,
    "hidden_size": 64,
    "depth": 1,
    "num_heads": 2,
    "num_queries": 4,
    "structure_downsamples": 0,
    "structure_width": 8,
    "qformer_depth": 1,
    "qformer_intermediate_size": 16,
}


def build(**arguments):
    torch.manual_seed(0)
    return VidTwin(**{**SIZES, "patch_size": 8, **arguments}).eval()


def linear(**arguments):
    return build(structure_shortcut=1, dynamics_shortcut=True, initialization="linear", **arguments)


def test_the_atoms_of_a_grey_patch_are_those_of_scipy_in_order_of_frequency():
    atoms, sizes = dct_atoms(8, 192)
    grey = [atom for atom in atoms if torch.allclose(atom[0], atom[1]) and torch.allclose(atom[1], atom[2])]
    assert len(grey) == 64
    frequencies = sorted((u * u + v * v, u, v) for u in range(8) for v in range(8))
    for atom, (_, u, v) in zip(grey, frequencies, strict=True):
        spectrum = torch.zeros(8, 8, dtype=torch.double)
        spectrum[u, v] = 1
        expected = torch.as_tensor(idctn(spectrum.numpy(), norm="ortho")).float() / 3**0.5
        torch.testing.assert_close(atom[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(atoms.flatten(1) @ atoms.flatten(1).T, torch.eye(192), atol=1e-5, rtol=0)
    assert torch.equal(sizes, sizes.sort(descending=True).values)
    assert sizes[0] == 1


def test_there_are_no_more_atoms_than_numbers_in_a_patch():
    assert len(dct_atoms(2, 64)[0]) == 12
    linear(patch_size=2, resolution=8)


def grey_ramps(frames=4, size=32):
    """Return four clips (4, 3, T, H, W) of smooth grey waves that pass by."""
    place = torch.linspace(0, 6.28, size)
    time = torch.arange(frames)[:, None, None] * 0.3
    waves = [torch.sin(place[:, None] * a + place * b + time) / 2 for a, b in ((1, 0), (0, 1), (1, 1), (2, -1))]
    return torch.stack(waves)[:, None].expand(-1, 3, -1, -1, -1)


@torch.no_grad()
def test_the_structure_starts_as_the_dct_of_the_mean_of_the_frames():
    model = linear()
    clip = grey_ramps()
    luma = clip.mean((1, 2)).unflatten(1, (4, 8)).unflatten(3, (4, 8)).mean((2, 4))  # (B, 4, 4), per patch
    number = model.encode(clip)["structure"].mean[:, 0, 0]
    torch.testing.assert_close(number, SCALE * luma, atol=0.3, rtol=0.1)


@torch.no_grad()
def test_a_smooth_clip_is_recognizable_before_the_first_step():
    clip = grey_ramps()
    errors = {}
    for name, model in {"linear": linear(), "balanced": build()}.items():
        errors[name] = (model(clip).clip - clip).square().mean() / clip.square().mean()
    assert errors["linear"] < 0.4 < 1 < errors["balanced"]


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [{}, {"patch_size": 16, "resolution": 64, "num_queries": 16, "structure_downsamples": 1}],
    ids=["patch 8", "patch 16 and a halving"],
)
def test_a_clip_starts_with_its_contrast(arguments):
    model = linear(**arguments)
    clip = 1.5 * grey_ramps(size=model.resolution)  # root mean square of 0.53, as of real clips
    contrast = (model(clip).clip * clip).sum() / clip.square().sum()
    assert 0.8 < contrast < 1.2


@torch.no_grad()
def test_what_moves_comes_from_the_dynamics():
    clip = grey_ramps()
    model = linear()
    latents, still = model.encode(clip).mode(), model.encode(clip.mean(2, keepdim=True).expand_as(clip)).mode()
    motion = clip - clip.mean(2, keepdim=True)

    def carried(structure, dynamics):
        decoded = model.decode({"structure": structure, "dynamics": dynamics})
        moved = decoded - decoded.mean(2, keepdim=True)
        return float((moved * motion).sum() / motion.square().sum())

    assert carried(still["structure"], latents["dynamics"]) > 0.25
    assert abs(carried(latents["structure"], still["dynamics"])) < 0.05
