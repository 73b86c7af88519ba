"""Weights of one VidTwin in another of other latents, clips and patches."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor
from torch.nn import functional as F

from vidtwin.errors import UserError
from vidtwin.models.resizing import resampling
from vidtwin.models.vidtwin import VidTwin
from vidtwin.storage import checkpoints

SIZES = {"num_queries": 4, "structure_channels": 4, "dynamics_channels": 4}


def seeded(**arguments: Any) -> VidTwin:
    torch.manual_seed(1)
    return tiny_model(**{**SIZES, **arguments}).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[VidTwin, Path]:
    """A model with every weight away from its initial value, and its file."""
    torch.manual_seed(0)
    model = tiny_model(**SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("source") / "weights.pt"
    torch.save(model.state_dict(), path)
    return model, path


def started(path: Path, **arguments: Any) -> tuple[VidTwin, list[str]]:
    model = seeded(**arguments)
    return model, checkpoints.load_part(model, path)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def test_resampling_interpolates_between_centres_and_averages_fewer_points():
    torch.testing.assert_close(
        resampling(2, 4), torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], dtype=torch.float64)
    )
    for before, after in ((14, 16), (16, 14), (7, 4), (1, 5), (5, 1)):
        torch.testing.assert_close(resampling(before, after).sum(1), torch.ones(after, dtype=torch.float64))


def test_the_same_sizes_keep_every_tensor(source):
    model, lines = started(source[1])
    own = len(source[0].state_dict())
    assert lines[0] == f"{own} of {own} tensors, weights"
    assert len(lines) == 2
    assert all(torch.equal(value, source[0].state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("more", [{"structure_channels": 6}, {"dynamics_channels": 6}, {"num_queries": 5}])
@torch.no_grad()
def test_further_channels_and_queries_leave_the_decoder_as_it_was(source, more):
    model, lines = started(source[1], **more)
    assert [line.split()[0] for line in lines[1:]] == ["kept"] * len(lines[1:])
    latents = {name: noise(2, *shape) for name, shape in model.latent_shapes((3, 4, 32, 32)).items()}
    (inner, size), latent = next(iter(more.items())), "dynamics" if "dynamics_channels" in more else "structure"
    axis = 2 if inner == "num_queries" else 1
    known = {**latents, latent: latents[latent].narrow(axis, 0, SIZES[inner])}
    torch.testing.assert_close(model.decode(latents), source[0].decode(known), rtol=1e-4, atol=1e-5)
    if inner != "num_queries":  # a further query also takes part in the attention of the others
        clip = noise(2, 3, 4, 32, 32).clamp(-1, 1)
        ours, theirs = model.encode(clip)[latent], source[0].encode(clip)[latent]
        for moment in ("mean", "logvar"):
            torch.testing.assert_close(getattr(ours, moment)[:, : SIZES[inner]], getattr(theirs, moment))
        assert ours.mean.shape[1] == size


@torch.no_grad()
def test_fewer_channels_and_queries_keep_the_first(source):
    model, _ = started(source[1], structure_channels=3, dynamics_channels=2, num_queries=3)
    latents = {name: noise(1, *shape) for name, shape in model.latent_shapes((3, 4, 32, 32)).items()}
    padded = {
        "structure": F.pad(latents["structure"], (0, 0, 0, 0, 0, 0, 0, 1)),
        "dynamics": F.pad(latents["dynamics"], (0, 0, 0, 0, 0, 2)),
    }
    decoded = model.dynamics.decode(latents["dynamics"])
    torch.testing.assert_close(decoded, source[0].dynamics.decode(padded["dynamics"]))
    # Features of a query that is left out are missing from each frame; those of the others are as before.
    frames = model.structure.to_frames.weight
    torch.testing.assert_close(frames, source[0].structure.to_frames.weight[:, :3])
    torch.testing.assert_close(
        model.structure.head.bias, source[0].structure.head.bias.unflatten(0, (2, 4))[:, :3].flatten()
    )
    torch.testing.assert_close(
        model.structure.qformer.queries, source[0].structure.qformer.queries[:3], msg="the first queries"
    )


@pytest.mark.parametrize("frames", [2, 6, 8])
@torch.no_grad()
def test_frames_of_the_structure_are_resampled(source, frames):
    model, lines = started(source[1], num_frames=frames)
    assert f"interpolated structure.to_frames.weight from (4, 4) to ({frames}, 4)" in lines
    queries = noise(3, 4)
    expected = resampling(4, frames).float() @ source[0].structure.to_frames(queries).T
    torch.testing.assert_close(model.structure.to_frames(queries).T, expected)


@pytest.mark.parametrize("size", [16, 48, 64])
@torch.no_grad()
def test_a_dynamics_constant_over_the_grid_is_decoded_as_resampled_features(source, size):
    """Before the last ReLU; both layers are linear in between."""
    model, lines = started(source[1], resolution=size)
    grid, layer = size // 8, model.dynamics.upsample[0]
    assert f"interpolated dynamics.upsample.2.weight from (4, 4) to ({grid}, {grid})" in lines
    before = source[0].dynamics.upsample[0]
    constant = layer(torch.ones(1, model.dynamics.size))
    torch.testing.assert_close(constant, before(torch.ones(1, source[0].dynamics.size)) @ resampling(4, grid).float().T)


@torch.no_grad()
def test_patches_that_grow_with_the_resolution_decode_the_same_picture_larger(source):
    """Same grid, so that only the pixels of a patch are resampled; exact within each patch."""
    model, lines = started(source[1], resolution=64, patch_size=16)
    assert "interpolated decoder.linear.weight from (192, 32) to (768, 32)" in lines
    clip = noise(1, 3, 4, 4, 4).clamp(-1, 1)  # a colour per patch
    small, large = (F.interpolate(clip, scale_factor=(1, side, side)) for side in (8, 16))
    latents = model.encode(large).mode()
    for name, latent in source[0].encode(small).mode().items():
        torch.testing.assert_close(latents[name], latent, rtol=1e-4, atol=1e-5)
    within = source[0].decode(latents).unflatten(4, (4, 8)).unflatten(3, (4, 8))
    rows = columns = resampling(8, 16).float()
    expected = torch.einsum("bcthpwq,rp,sq->bcthrws", within, rows, columns).flatten(5).flatten(3, 4)
    torch.testing.assert_close(model.decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_levels_of_the_structure_are_counted_from_the_features(tmp_path):
    deep, shallow = (seeded(structure_downsamples=levels) for levels in (2, 1))
    torch.save(deep.state_dict(), tmp_path / "deep.pt")
    fresh = shallow.structure.head.weight.clone()
    lines = checkpoints.load_part(shallow, tmp_path / "deep.pt")
    assert torch.equal(shallow.structure.upsample[0].weight, deep.structure.upsample[3].weight)
    assert torch.equal(shallow.structure.downsample[0].weight, deep.structure.downsample[0].weight)
    assert torch.equal(shallow.structure.head.weight, fresh)
    assert "fresh structure.head.weight: (8, 32, 3, 3) in the file, (8, 16, 3, 3) here" in lines
    assert "fresh structure.head.bias: its layer is fresh" in lines
    assert "unused structure.upsample.0 (2 tensors)" in lines
    assert "unused structure.downsample.2 (2 tensors)" in lines


def test_another_depth_is_taken_as_far_as_it_goes_and_another_width_is_refused(source):
    _, lines = started(source[1], depth=2)
    assert "fresh encoder.transformer.blocks.1 (13 tensors): not in the file" in lines
    with pytest.raises(UserError, match=r"got \d\.\d% of its numbers \(encoder\.patch_embed\.weight is \(32, 192\) in"):
        started(source[1], hidden_size=64)


# Released weights.


@pytest.fixture(scope="module")
def released(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the official form: width 96, depth 2, 4 heads, 16x64x64."""
    golden = load_file(shared / "golden" / "golden_a.safetensors")
    state = {k.removeprefix("state_dict."): value for k, value in golden.items() if k.startswith("state_dict.")}
    path = tmp_path_factory.mktemp("released") / "vidtwin.ckpt"
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}, "global_step": 7}, path)
    return path


def test_a_released_file_is_taken_as_it_is(released):
    wanted = VidTwin.from_official(released, num_heads=4)
    model = VidTwin(**wanted.init_args)
    own = len(wanted.state_dict())
    assert checkpoints.load_part(model, released)[0] == f"{own} of {own} tensors, weights of the released VidTwin"
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in model.state_dict().items())
    with_shortcuts = VidTwin(**{**wanted.init_args, "structure_shortcut": 1, "dynamics_shortcut": True})
    expected = "other arguments: structure_shortcut 0 there, 1 here; dynamics_shortcut False there, True here"
    assert expected in checkpoints.load_part(with_shortcuts, released)


def test_a_released_file_is_fitted_to_other_sizes_and_every_tensor_is_listed(released):
    sizes = VidTwin.from_official(released, num_heads=4).init_args
    other = {"num_frames": 32, "resolution": 96, "num_queries": 12, "structure_channels": 12, "dynamics_channels": 16}
    model = VidTwin(**{**sizes, **other, "dynamics_downsamples": 2})
    lines = checkpoints.load_part(model, released)
    listed = [re.search(r"(\S+) from \((.*)\) to \((.*)\)", line) for line in lines]
    listed = {match[1]: (match[2], match[3]) for match in listed if match}
    assert listed == {
        "structure.qformer.queries": ("16, 64", "12, 64"),
        "structure.head.weight": ("16, 256, 3, 3", "24, 256, 3, 3"),
        "structure.head.bias": ("16,", "24,"),
        "structure.embed.0.weight": ("256, 8, 3, 3", "256, 12, 3, 3"),
        "structure.to_frames.weight": ("16, 16", "32, 12"),
        "structure.to_frames.bias": ("16,", "32,"),
        "dynamics.head.weight": ("16, 96, 3, 3", "32, 96, 3, 3"),
        "dynamics.head.bias": ("16,", "32,"),
        "dynamics.embed.0.weight": ("96, 8", "96, 16"),
        "dynamics.upsample.0.weight": ("4, 2", "6, 2"),
        "dynamics.upsample.0.bias": ("4,", "6,"),
        "dynamics.upsample.2.weight": ("4, 4", "6, 6"),
        "dynamics.upsample.2.bias": ("4,", "6,"),
    }
    assert [line for line in lines if line.startswith(("fresh", "unused"))] == [
        "fresh dynamics.downsample.2 (2 tensors): not in the file"
    ]
    kept = sum(map(int, re.findall(r"\d+", next(line for line in lines if line.startswith("kept ")))))
    assert kept + len(listed) + 2 == len(model.state_dict())


def test_a_released_file_with_other_positions_or_a_part_missing_is_refused(released, tmp_path):
    held = torch.load(released)
    model = VidTwin(**VidTwin.from_official(released, num_heads=4).init_args)
    for name, value, message in (
        ("encoder.pos_embed", held["state_dict"]["encoder.pos_embed"] * 2, "others in encoder.pos_embed"),
        ("conv_in.weight", torch.zeros(()), "conv_in.weight with 4 axes"),
    ):
        torch.save({"state_dict": held["state_dict"] | {name: value}}, tmp_path / "changed.ckpt")
        with pytest.raises(UserError, match=message):
            checkpoints.load_part(model, tmp_path / "changed.ckpt")
