"""Linear shortcuts without parameters over VidTwin's branches (residual autoencoding, Chen et al. 2025).

    features (B, C, T, H, W) ── average ──> numbers of the latent's shape, added to the branch's mean
    latent                   ── repeat ───> features (B, C, T, H, W), added to those of the branch

**Structure** holds means over time. Its n_q maps of d_S channels are F frame groups of N = (n_q / F) · d_S numbers per
position of the latent. Such a position covers s × s positions of the features, s = 2^downsamples. The N numbers keep
P = 2^a · 2^b of these places apart, with G = N / P channel groups each: P is the largest power of two that divides N,
at most s², because averages over places lose what the decoder cannot restore.

    z[f, i, j, g] = 1/√|C_g| · Σ_{c ∈ C_g} ε_c · mean_{t ∈ T_f, y ∈ Y_i, x ∈ X_j} features[c, t, y, x]
    features[c, t, y, x] = ε_c · z[f, i, j, g]     of the group of frames, place and channel group that hold them

Groups are consecutive and of equal size, or differ by one. The signs ε alternate in a channel group: the decoder's
layer norms subtract the mean of all channels, and would subtract z too if it were added to all with the same sign. Both
ways keep the root mean square of channels that are independent.

With F = 1 the shortcut carries the mean of all frames and no motion; with F = n_q = T, each frame by itself.

**Dynamics** hold each frame's difference from the mean of its frame group (of all frames without a structure shortcut):
nothing of a still. A profile along the width averages over the height. One average would lose where in the column
something moves, so the d_D channels are averages over S segments of the height, of d_D / S channel groups each; S is
the largest divisor of d_D that the grid has room for. A profile along the height has segments of the width. The channel
groups are the first ones of the structure (or as many as are needed), so both write the same features.

    moved[c, t, y, x] = features[c, t, y, x] - mean_{u ∈ T_f} features[c, u, y, x]     of the group of frames with t
    z[s, g, t, j] = 1/√|C_g| · Σ_{c ∈ C_g} ε_c · mean_{y ∈ Y_s, x ∈ X_j} moved[c, t, y, x]
    features[c, t, y, x] = ε_c · (z[s, g, t, j] + z'[s', g, t, j']) / 2     of both profiles
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from vidtwin.errors import UserError


def group_equally(size: int, number: int) -> Tensor:
    """Divide `size` elements into `number` consecutive groups → the group of each element, (size,)."""
    return torch.arange(size) * number // size


def averaging_matrix(groups: Tensor, number: int) -> Tensor:
    """Return the matrix (number, size) whose rows average the elements of each group; 0 for an empty group."""
    members = nn.functional.one_hot(groups, number).T.float()
    return members / members.sum(1, keepdim=True).clamp_min(1)


def signed_matrix(groups: Tensor, number: int) -> Tensor:
    """Return the matrix (number, size) with orthonormal rows: ±1/√|group| in alternation, 0 outside the group."""
    members = nn.functional.one_hot(groups, number).T.float()
    signs = 1 - 2 * ((members.cumsum(1) - 1) % 2)
    return members * signs / members.sum(1, keepdim=True).sqrt()


class StructureShortcut(nn.Module):
    """Average features onto the structure latent, and repeat the latent onto features.

    Args:
        hidden_size: C.
        num_frames: T.
        grid_size: H = W of the features.
        num_queries: n_q.
        channels: d_S.
        downsamples: Halvings of the grid, k; s = 2^k.
        frame_groups: F, a divisor of `num_queries`, at most `num_frames`.

    Raises:
        UserError: `frame_groups` does not fit, or the latent has more numbers than the features.
    """

    channel_weights: Tensor
    frame_weights: Tensor
    row_weights: Tensor
    column_weights: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_frames: int,
        grid_size: int,
        num_queries: int,
        channels: int,
        downsamples: int,
        frame_groups: int,
    ) -> None:
        super().__init__()
        if num_queries % frame_groups or frame_groups > num_frames:
            raise UserError(
                f"Expected structure_shortcut to divide num_queries {num_queries} and not to exceed num_frames "
                f"{num_frames}, got {frame_groups}."
            )
        numbers = num_queries // frame_groups * channels
        doublings = 0
        while doublings < 2 * downsamples and numbers % 2 ** (doublings + 1) == 0:
            doublings += 1
        channel_groups = numbers >> doublings
        if channel_groups > hidden_size:
            raise UserError(
                f"Expected at most {hidden_size << doublings} structure numbers per frame group (num_queries / "
                f"structure_shortcut * structure_channels), got {numbers}; set a larger structure_shortcut or fewer "
                "structure_channels."
            )
        self.channels = channels
        self.size = -(-grid_size // 2**downsamples)
        self.places = (2 ** (doublings // 2), 2 ** (doublings - doublings // 2))  # rows, columns
        weights = {"channel_weights": signed_matrix(group_equally(hidden_size, channel_groups), channel_groups)}
        weights["frame_weights"] = averaging_matrix(group_equally(num_frames, frame_groups), frame_groups)
        for name, places in zip(("row_weights", "column_weights"), self.places, strict=True):
            groups = torch.arange(grid_size) // (2**downsamples // places)
            weights[name] = averaging_matrix(groups, self.size * places)
        for name, matrix in weights.items():
            self.register_buffer(name, matrix, persistent=False)

    def average(self, features: Tensor) -> Tensor:
        """Average features (B, C, T, H, W) → (B, d_S, n_q, h, w)."""
        z = torch.einsum("bcthw,gc->bthwg", features, self.channel_weights)
        z = torch.einsum("bthwg,ft->bfhwg", z, self.frame_weights)
        z = torch.einsum("bfhwg,yh,xw->bfyxg", z, self.row_weights, self.column_weights)
        rows, columns = self.places
        z = rearrange(z, "b f (h i) (w j) g -> b f (g i j) h w", i=rows, j=columns)
        return rearrange(z, "b f (q d) h w -> b d (f q) h w", d=self.channels)

    def repeat(self, latent: Tensor) -> Tensor:
        """Repeat a latent (B, d_S, n_q, h, w) → features (B, C, T, H, W)."""
        rows, columns = self.places
        z = rearrange(latent, "b d (f q) h w -> b f (q d) h w", f=self.frame_weights.shape[0])
        z = rearrange(z, "b f (g i j) h w -> b f (h i) (w j) g", i=rows, j=columns)
        # Each frame, row and column has one positive weight, that of its group.
        z = torch.einsum("bfyxg,ft->btyxg", z, self.frame_weights.sign())
        z = torch.einsum("btyxg,yh,xw->bthwg", z, self.row_weights.sign(), self.column_weights.sign())
        return torch.einsum("bthwg,gc->bthwc", z, self.channel_weights.sign()).movedim(-1, 1)


class DynamicsShortcut(nn.Module):
    """Average the motion of features onto the dynamics latent, and repeat the latent onto features.

    Args:
        hidden_size: C.
        num_frames: T.
        grid_size: H = W of the features.
        channels: d_D.
        downsamples: Halvings of the grid, rounded up.
        frame_groups: F, the groups of frames whose means are left to the structure.
        channel_groups: G of the structure shortcut.

    Raises:
        UserError: There are more channel groups than channels.
    """

    channel_weights: Tensor
    frame_weights: Tensor
    segment_weights: Tensor
    place_weights: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_frames: int,
        grid_size: int,
        channels: int,
        downsamples: int,
        frame_groups: int = 1,
        channel_groups: int = 1,
    ) -> None:
        super().__init__()
        self.segments = segments = max(s for s in range(1, grid_size + 1) if channels % s == 0)
        self.size = -(-grid_size // 2**downsamples)
        groups = channels // segments
        if groups > hidden_size:
            raise UserError(
                f"Expected at most {hidden_size * segments} dynamics_channels with dynamics_shortcut, got {channels}."
            )
        number = max(groups, channel_groups)
        frames = group_equally(num_frames, frame_groups)
        weights = {
            "channel_weights": signed_matrix(group_equally(hidden_size, number), number)[:groups],
            "frame_weights": averaging_matrix(frames, frame_groups)[frames],  # (T, T): each frame's group mean
            "segment_weights": averaging_matrix(group_equally(grid_size, segments), segments),
            "place_weights": averaging_matrix(torch.arange(grid_size) // 2**downsamples, self.size),
        }
        for name, matrix in weights.items():
            self.register_buffer(name, matrix, persistent=False)

    def average(self, features: Tensor) -> Tensor:
        """Average features (B, C, T, H, W) → (B, d_D, T, w + h), the profile along the width first."""
        z = torch.einsum("bcthw,gc->bgthw", features, self.channel_weights)
        z = z - torch.einsum("bgthw,ut->bguhw", z, self.frame_weights)
        along_width = torch.einsum("bgthw,sh,jw->bgstj", z, self.segment_weights, self.place_weights)
        along_height = torch.einsum("bgthw,sw,jh->bgstj", z, self.segment_weights, self.place_weights)
        return torch.cat([along_width, along_height], dim=-1).flatten(1, 2)

    def repeat(self, latent: Tensor) -> Tensor:
        """Repeat a latent (B, d_D, T, w + h) → features (B, C, T, H, W)."""
        along_width, along_height = latent.unflatten(1, (-1, self.segments)).split(self.size, dim=-1)
        segments, places = self.segment_weights.sign(), self.place_weights.sign()
        along_width = torch.einsum("bgstj,sh,jw->bgthw", along_width, segments, places)
        along_height = torch.einsum("bgstj,sw,jh->bgthw", along_height, segments, places)
        mean = (along_width + along_height) / 2
        return torch.einsum("bgthw,gc->bcthw", mean, self.channel_weights.sign())
