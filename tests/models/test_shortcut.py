"""The shortcuts over the branches: their maps against loops over every number, and in the model."""

import math
from itertools import product

import pytest
import torch

from vidtwin.errors import UserError
from vidtwin.models.shortcut import DynamicsShortcut, StructureShortcut
from vidtwin.models.vidtwin import VidTwin
from vidtwin.testing import check_autoencoder

NAMES = ("hidden_size", "num_frames", "grid_size", "num_queries", "channels", "downsamples", "frame_groups")
# Sizes, and the places (rows, columns) that a position of the latent keeps apart.
CASES = {
    "all frames": ((6, 4, 2, 2, 3, 0, 1), (1, 1)),
    "a frame group per map": ((6, 4, 2, 2, 3, 0, 2), (1, 1)),
    "two frame groups of unequal length": ((6, 5, 2, 4, 1, 0, 2), (1, 1)),
    "unequal channel groups": ((7, 2, 2, 1, 4, 0, 1), (1, 1)),
    "four places of one channel group": ((6, 2, 4, 1, 4, 1, 1), (2, 2)),
    "four places over two maps": ((6, 2, 4, 2, 2, 1, 1), (2, 2)),
    "12 channels, two halvings": ((6, 3, 4, 1, 12, 2, 1), (2, 2)),
    "4 channels, two halvings, many maps": ((6, 4, 4, 4, 4, 2, 1), (4, 4)),
    "two of four places": ((6, 2, 4, 1, 2, 1, 1), (1, 2)),
    "odd number": ((6, 2, 4, 1, 3, 1, 1), (1, 1)),
    "odd grid": ((6, 2, 5, 1, 8, 1, 1), (2, 2)),
    "odd grid, averaged places": ((6, 2, 5, 2, 2, 2, 1), (2, 2)),
    "one patch": ((6, 1, 1, 1, 4, 1, 1), (2, 2)),
}


def group_of(index, size, number):
    return next(group for group in range(number) if index * number // size == group)


def numbers(sizes, places):
    """All numbers of the latent → (d, q, h, w) and the channels, frames, rows and columns that belong to it."""
    size, frames, grid, queries, channels, downsamples, frame_groups = sizes
    rows, columns = places
    of_group = queries // frame_groups * channels
    channel_groups = of_group // (rows * columns)
    side = 2**downsamples
    height = math.ceil(grid / side)
    for f, n, h, w in product(range(frame_groups), range(of_group), range(height), range(height)):
        g, place = divmod(n, rows * columns)
        i, j = divmod(place, columns)
        inside = [c for c in range(size) if group_of(c, size, channel_groups) == g]
        times = [t for t in range(frames) if group_of(t, frames, frame_groups) == f]
        top, left = h * side + i * side // rows, w * side + j * side // columns
        ys = [y for y in range(top, top + side // rows) if y < grid]
        xs = [x for x in range(left, left + side // columns) if x < grid]
        yield (n % channels, f * (queries // frame_groups) + n // channels, h, w), inside, times, ys, xs


@pytest.mark.parametrize("case", CASES)
def test_both_maps_are_those_of_the_formulas(case):
    sizes, places = CASES[case]
    shortcut = StructureShortcut(**dict(zip(NAMES, sizes, strict=True))).double()
    size, frames, grid, queries, channels, downsamples, _ = sizes
    height = math.ceil(grid / 2**downsamples)
    assert shortcut.places == places
    features = torch.randn(2, size, frames, grid, grid, dtype=torch.double)
    latent = torch.randn(2, channels, queries, height, height, dtype=torch.double)
    averaged, repeated = torch.zeros_like(latent), torch.zeros_like(features)
    for (d, q, h, w), inside, times, ys, xs in numbers(sizes, places):
        for place, channel in enumerate(inside):
            sign = (-1) ** place
            if ys and xs:
                mean = features[:, channel][:, times][:, :, ys][:, :, :, xs].mean((1, 2, 3))
                averaged[:, d, q, h, w] += sign * mean / len(inside) ** 0.5
            for t, y, x in product(times, ys, xs):
                repeated[:, channel, t, y, x] += sign * latent[:, d, q, h, w]
    torch.testing.assert_close(shortcut.average(features), averaged)
    torch.testing.assert_close(shortcut.repeat(latent), repeated)


# Sizes (C, T, grid, d_D, halvings, frame groups, the structure's channel groups), and the segments S.
DYNAMICS = {
    "a segment per patch": ((6, 3, 4, 4, 0, 1, 1), 4),
    "two channel groups": ((6, 3, 4, 8, 1, 1, 1), 4),
    "two of the structure's three channel groups": ((7, 3, 4, 8, 1, 1, 3), 4),
    "a divisor below the grid": ((5, 2, 4, 6, 1, 1, 1), 3),
    "odd grid, unequal segments": ((4, 2, 5, 4, 1, 1, 1), 4),
    "frame groups": ((4, 5, 2, 2, 1, 2, 1), 2),
    "prime number of channels": ((6, 2, 3, 5, 0, 1, 1), 1),
    "one patch": ((4, 2, 1, 2, 1, 1, 2), 1),
}


@pytest.mark.parametrize("case", DYNAMICS)
def test_both_maps_of_the_dynamics_are_those_of_the_formulas(case):
    sizes, segments = DYNAMICS[case]
    size, frames, grid, channels, halvings, frame_groups, structure_groups = sizes
    shortcut = DynamicsShortcut(*sizes).double()
    assert shortcut.segments == segments
    side, groups = 2**halvings, channels // segments
    places = math.ceil(grid / side)
    features = torch.randn(2, size, frames, grid, grid, dtype=torch.double)
    latent = torch.randn(2, channels, frames, 2 * places, dtype=torch.double)
    moved = features.clone()
    for f in range(frame_groups):
        times = [t for t in range(frames) if group_of(t, frames, frame_groups) == f]
        moved[:, :, times] -= features[:, :, times].mean(2, keepdim=True)
    averaged, repeated = torch.zeros_like(latent), torch.zeros_like(features)
    for g, s, t, j in product(range(groups), range(segments), range(frames), range(places)):
        inside = [c for c in range(size) if group_of(c, size, max(groups, structure_groups)) == g]
        across = [y for y in range(grid) if group_of(y, grid, segments) == s]
        along = [x for x in range(grid) if x // side == j]
        for place, channel in enumerate(inside):
            sign = (-1) ** place
            frame = moved[:, channel, t]
            d = g * segments + s
            averaged[:, d, t, j] += sign * frame[:, across][:, :, along].mean((1, 2)) / len(inside) ** 0.5
            averaged[:, d, t, places + j] += sign * frame[:, along][:, :, across].mean((1, 2)) / len(inside) ** 0.5
            for y, x in product(across, along):
                repeated[:, channel, t, y, x] += sign * latent[:, d, t, j] / 2
                repeated[:, channel, t, x, y] += sign * latent[:, d, t, places + j] / 2
    torch.testing.assert_close(shortcut.average(features), averaged)
    torch.testing.assert_close(shortcut.repeat(latent), repeated)


def test_a_still_has_no_dynamics_in_the_shortcut():
    shortcut = DynamicsShortcut(8, 4, 4, 4, 1)
    still = torch.randn(1, 8, 1, 4, 4).expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(shortcut.average(still), torch.zeros(1, 4, 4, 4), atol=1e-6, rtol=0)


def test_both_maps_keep_the_size_of_independent_channels():
    shortcut = StructureShortcut(768, 1, 4, 4, 4, 1, 1)
    features = torch.randn(2, 768, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    latent = shortcut.average(features)
    assert float(latent.square().mean()) == pytest.approx(1, abs=0.25)
    repeated = shortcut.repeat(latent)
    torch.testing.assert_close(repeated.square().mean(), latent.square().mean())


def test_layer_norm_does_not_subtract_a_number_that_is_repeated_to_all_channels():
    shortcut = StructureShortcut(24, 1, 1, 1, 1, 0, 1)
    repeated = shortcut.repeat(torch.full((1, 1, 1, 1, 1), 3.0))
    torch.testing.assert_close(repeated.mean(1), torch.zeros(1, 1, 1, 1))


TINY = {
    "num_frames": 4,
    "resolution": 32,
    "patch_size": 8,
    "hidden_size": 24,
    "depth": 1,
    "num_heads": 2,
    "num_queries": 4,
    "structure_width": 4,
    "query_size": 16,
    "qformer_depth": 1,
    "qformer_heads": 2,
    "qformer_intermediate_size": 16,
}


def tiny(**arguments):
    torch.manual_seed(0)
    return VidTwin(**{**TINY, **arguments}).eval()


@pytest.mark.parametrize(
    "arguments",
    [
        {"structure_shortcut": 1},
        {"structure_shortcut": 4, "structure_channels": 12, "structure_downsamples": 2},
        {"structure_shortcut": 2, "resolution": 40, "structure_channels": 3},
        {"structure_shortcut": 1, "dynamics_shortcut": True, "initialization": "linear", "resolution": 40},
    ],
    ids=["all frames", "each frame", "odd grid", "both branches"],
)
def test_a_model_with_a_shortcut_keeps_the_contract(arguments):
    model = tiny(**arguments)
    check_autoencoder(model, num_frames=4)
    assert arguments.items() <= model.spec()["init_args"].items()


@torch.no_grad()
def test_the_shortcut_is_added_to_the_structure_alone_and_has_no_weights():
    plain, model = tiny(), tiny(structure_shortcut=1)
    assert model.state_dict().keys() == plain.state_dict().keys()
    clip = torch.rand(2, 3, 4, 32, 32) * 2 - 1
    features, encodings = model.features(clip), [m.encode(clip) for m in (plain, model)]
    averaged = model.structure.shortcut.average(features)
    assert float(averaged.abs().max()) > 0.1
    torch.testing.assert_close(encodings[1]["structure"].mean, encodings[0]["structure"].mean + averaged)
    torch.testing.assert_close(encodings[1]["structure"].logvar, encodings[0]["structure"].logvar)
    torch.testing.assert_close(encodings[1]["dynamics"].mean, encodings[0]["dynamics"].mean)
    latents = encodings[1].mode()
    decoded = model.structure.decode(latents["structure"]) - plain.structure.decode(latents["structure"])
    torch.testing.assert_close(decoded, model.structure.shortcut.repeat(latents["structure"]))
    dynamics = {"dynamics": latents["dynamics"]}
    assert torch.equal(model.decode(dynamics), plain.decode(dynamics))
    assert not torch.allclose(model.decode(latents), plain.decode(latents), atol=1e-3)


@torch.no_grad()
def test_the_shortcut_over_the_dynamics_is_added_to_them_alone_and_has_no_weights():
    plain, model = tiny(), tiny(dynamics_shortcut=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    clip = torch.rand(2, 3, 4, 32, 32) * 2 - 1
    shortcut, encodings = model.dynamics.shortcut, [m.encode(clip) for m in (plain, model)]
    averaged = shortcut.average(model.features(clip))
    assert float(averaged.abs().max()) > 0.1
    torch.testing.assert_close(encodings[1]["dynamics"].mean, encodings[0]["dynamics"].mean + averaged)
    torch.testing.assert_close(encodings[1]["dynamics"].logvar, encodings[0]["dynamics"].logvar)
    torch.testing.assert_close(encodings[1]["structure"].mean, encodings[0]["structure"].mean)
    latent = encodings[1].mode()["dynamics"]
    repeated = model.dynamics.decode(latent) - plain.dynamics.decode(latent)
    torch.testing.assert_close(repeated, shortcut.repeat(latent))


def test_with_one_frame_group_a_structure_latent_alone_starts_as_a_still():
    model = tiny(structure_shortcut=1)
    with torch.no_grad():
        features = model.structure.decode(torch.randn(1, *model.latent_shapes((3, 4, 32, 32))["structure"]))
    torch.testing.assert_close(features, features[:, :, :1].expand_as(features))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure_shortcut": -1}, r"^Expected structure_shortcut of at least 0, got -1\.$"),
        (
            {"structure_shortcut": 3},
            r"^Expected structure_shortcut to divide num_queries 4 and not to exceed num_frames 4, got 3\.$",
        ),
        (
            {"structure_shortcut": 8, "num_queries": 8},
            r"^Expected structure_shortcut to divide num_queries 8 and not to exceed num_frames 4, got 8\.$",
        ),
        (
            {"structure_shortcut": 1, "structure_channels": 28},
            r"^Expected at most 96 structure numbers per frame group \(.*\), got 112; set a larger structure_shortcut "
            r"or fewer structure_channels\.$",
        ),
        (
            {"dynamics_shortcut": True, "dynamics_channels": 29},
            r"^Expected at most 24 dynamics_channels with dynamics_shortcut, got 29\.$",
        ),
        (
            {"dynamics_shortcut": True, "initialization": "linear"},
            r'^Expected structure_shortcut of at least 1 with initialization "linear", got 0; set 1\.$',
        ),
    ],
    ids=[
        "negative",
        "no divisor",
        "more than frames",
        "more numbers than features",
        "more dynamics than features",
        "linear without a shortcut",
    ],
)
def test_a_shortcut_that_does_not_fit_is_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        tiny(**arguments)
