"""Sampled vectors of codebook models are moved to the nearest entries."""

import pytest
import torch
from sweeping import Coded, Pool
from tiny import baseline_task

from vidtwin.diffusion import codebooks
from vidtwin.diffusion.codebooks import snap


@pytest.mark.parametrize("name", ["magvit2", "ivideogpt"])
def test_latents_beside_the_entries_decode_as_the_codes(name, monkeypatch):
    """With codes of bits and of vectors, and with codebooks read in several parts."""
    model = baseline_task(name).autoencoder.eval()
    monkeypatch.setattr(codebooks, "_DISTANCES", 1)
    clip_shape = (3, model.temporal.usual_length, *[model.resolution or 32] * 2)
    shapes = model.code_shapes(clip_shape)
    assert shapes
    torch.manual_seed(0)
    codes = {key: torch.randint(size, (2, *shape)) for key, (shape, size) in shapes.items()}
    latents = model.dequantize(codes)
    for value in latents.values():  # all pairs of entries are further apart than twice the error
        entries = value.movedim(1, -1).flatten(0, -2).unique(dim=0)
        apart = torch.cdist(entries, entries).fill_diagonal_(torch.inf).min()
        value += 0.4 * apart / value.shape[1] ** 0.5 * (2 * torch.rand_like(value) - 1)
    found = snap(model, latents, clip_shape)
    assert found.keys() == latents.keys()
    for key, value in model.dequantize(codes).items():
        assert not torch.equal(latents[key], value)
        assert torch.equal(found[key], value)


def test_codes_of_single_numbers_in_padded_pictures_and_latents_without_codes():
    grid = torch.randn(2, 3, 8, 7, 7)
    assert torch.equal(snap(Coded(pool=5, frames=8), {"grid": grid}, (3, 8, 32, 32))["grid"], (grid > 0).float() - 0.5)
    assert snap(Pool(frames=8), {"grid": grid}, (3, 8, 32, 32))["grid"] is grid


class Far(Coded):
    def dequantize(self, codes):
        return {"grid": codes["grid"] + 999.5}


def test_the_nearest_entry_is_found_in_full_precision_under_autocast():
    codes = torch.randint(2, (2, 3, 8, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = snap(Far(pool=8, frames=8), {"grid": codes + 999.6}, (3, 8, 32, 32))["grid"]
    assert torch.equal(found, codes + 999.5)
