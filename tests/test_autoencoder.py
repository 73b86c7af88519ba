"""The interface: legal lengths, padding, ranges, rates; and that `check_autoencoder` catches each broken promise."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from vidtwin.apply.windows import windows as cut
from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.clips import as_clip
from vidtwin.errors import UserError
from vidtwin.posteriors import Deterministic, DiagonalGaussian, Encoding, Quantized
from vidtwin.testing import ContractError, check_autoencoder, check_promises
from vidtwin.video import write_video


class Patches(VideoAutoencoder):
    """The smallest model that keeps every promise: each 8×8 patch of each frame is `channels` numbers."""

    latent_names = ("patches",)
    spatial_multiple = 8

    def __init__(self, channels=2):
        super().__init__()
        self.down = nn.Conv3d(3, channels, (1, 8, 8), stride=(1, 8, 8))
        self.up = nn.ConvTranspose3d(channels, 3, (1, 8, 8), stride=(1, 8, 8))

    def _encode(self, clip):
        return Encoding(patches=Deterministic(self.down(clip)))

    def _decode(self, latents):
        return self.up(latents["patches"])

    def _latent_shapes(self, clip_shape):
        _, frames, height, width = clip_shape
        return {"patches": (self.down.out_channels, frames, height // 8, width // 8)}

    @property
    def last_layer(self):
        return self.up.weight


class Padded(Patches):
    """Takes 4k+1 frames, keeps k+1 of them."""

    temporal = TemporalSpec(multiple=4, offset=1, pad="last")

    def _encode(self, clip):
        return super()._encode(clip[:, :, ::4])

    def _decode(self, latents):
        frames = super()._decode(latents)
        return torch.cat([frames[:, :, :1], frames[:, :, 1:].repeat_interleave(4, 2)], 2)

    def _latent_shapes(self, clip_shape):
        return super()._latent_shapes((3, (clip_shape[1] + 3) // 4, *clip_shape[2:]))


class Codes(Patches):
    """Each patch is one of `codebook_size` vectors."""

    def __init__(self, channels=2, codebook_size=8):
        super().__init__(channels)
        self.codebook = nn.Embedding(codebook_size, channels)

    def _encode(self, clip):
        vectors = self.down(clip).movedim(1, -1)
        codes = torch.cdist(vectors.flatten(0, -2), self.codebook.weight).argmin(1).view(vectors.shape[:-1])
        nearest = self.codebook(codes)
        terms = {
            "commitment": (vectors - nearest.detach()).square().mean(),
            "codebook": (vectors.detach() - nearest).square().mean(),
        }
        value = vectors + (nearest - vectors).detach()
        return Encoding(patches=Quantized(value.movedim(-1, 1), codes, self.codebook.num_embeddings, terms))

    def code_shapes(self, clip_shape):
        return {"patches": (self.latent_shapes(clip_shape)["patches"][1:], self.codebook.num_embeddings)}

    def dequantize(self, codes):
        return {name: self.codebook(code).movedim(-1, 1) for name, code in codes.items()}


class PaddedCodes(Padded, Codes):
    """Both at once: the padding is in the bits too."""


class Identity(VideoAutoencoder):
    """Its latent is the padded clip itself, in its own range of values."""

    latent_names = ("clip",)

    def __init__(self, **temporal):
        super().__init__()
        self.temporal = TemporalSpec(**temporal)

    def _encode(self, clip):
        return Encoding(clip=Deterministic(clip))

    def _decode(self, latents):
        return latents["clip"]

    def _latent_shapes(self, clip_shape):
        return {"clip": tuple(clip_shape)}

    @property
    def last_layer(self):
        raise UserError("nothing to train")


class PatchesOf(Patches):
    """Of clips of some lengths."""

    def __init__(self, temporal):
        super().__init__()
        self.temporal = TemporalSpec(**temporal)


def some_clip(frames=6, side=16, batch=2):
    return torch.rand(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(cls, **arguments):
    torch.manual_seed(0)
    return cls(**arguments).eval()


# Legal lengths and padding.


@pytest.mark.parametrize(
    ("spec", "lengths"),
    [
        (TemporalSpec(pad="last"), {1: 1, 7: 7}),
        (TemporalSpec(multiple=4, pad="last"), {1: 4, 4: 4, 5: 8, 16: 16}),
        (TemporalSpec(multiple=4, offset=1, pad="last"), {1: 1, 2: 5, 16: 17, 17: 17}),
        (TemporalSpec(multiple=8, offset=1, minimum=9, pad="first"), {1: 9, 9: 9, 10: 17}),
        (TemporalSpec(multiple=2, minimum=3, maximum=6, pad="last"), {1: 4, 5: 6, 6: 6}),
    ],
    ids=str,
)
def test_a_clip_is_padded_to_the_next_legal_length(spec, lengths):
    assert {frames: spec.legal_length(frames) for frames in lengths} == lengths
    assert all(spec.is_legal(length) for length in lengths.values())


@pytest.mark.parametrize(
    ("spec", "frames", "expected"),
    [
        (TemporalSpec.exactly(16), 17, "16 frames"),
        (TemporalSpec(multiple=4, offset=1), 16, "4k+1 frames (at least 1)"),
        (TemporalSpec(multiple=4, minimum=4, maximum=16, pad="last"), 17, "4k frames (at least 4, at most 16)"),
        (TemporalSpec(minimum=2), 1, "any number of frames (at least 2)"),
    ],
    ids=str,
)
def test_other_lengths_are_refused_with_what_is_legal(spec, frames, expected):
    with pytest.raises(UserError) as error:
        spec.legal_length(frames)
    assert str(error.value) == f"Expected a clip of {expected}, got {frames}; set data.num_frames accordingly."


@pytest.mark.parametrize(
    ("spec", "length"),
    [
        (TemporalSpec(), 16),
        (TemporalSpec.exactly(4), 4),
        (TemporalSpec(maximum=8), 8),
        (TemporalSpec(minimum=17), 17),
        (TemporalSpec(multiple=8, offset=1, pad="first"), 17),
        (TemporalSpec(multiple=4, offset=1, maximum=16), 13),
        (TemporalSpec(multiple=8, minimum=17, maximum=30), 24),
        (TemporalSpec(multiple=4, offset=5, minimum=5), 17),
        (TemporalSpec(maximum=64), 16),
    ],
    ids=str,
)
def test_where_no_length_is_asked_for_it_is_a_legal_one_near_16(spec, length):
    assert spec.usual_length == length
    assert spec.is_legal(length)


def test_a_spec_that_no_length_keeps_is_refused_where_one_is_wanted():
    with pytest.raises(UserError, match=r"Expected a temporal that some length keeps, got 8k frames \(at least 17, at"):
        _ = TemporalSpec(multiple=8, minimum=17, maximum=20).usual_length


@pytest.mark.parametrize(
    ("temporal", "windows"),
    [
        ({"minimum": 17}, [17, 17]),
        ({"maximum": 8}, [8, 8, 8]),
        ({"multiple": 8, "offset": 1, "pad": "first"}, [17, 17]),
        ({}, [16, 16]),
    ],
    ids=str,
)
def test_a_video_goes_through_in_windows_of_a_length_that_the_model_takes(tmp_path, temporal, windows):
    model = build(PatchesOf, temporal=temporal)
    video = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", video, 8)
    seen = [as_clip([window.frames]) for window in cut(tmp_path / "a.mp4", model.temporal.usual_length)]
    assert [clip.shape[2] for clip in seen] == windows
    assert [model(clip).clip.shape[2] for clip in seen] == windows
    frames = torch.cat(seen, 2)[0]
    assert not torch.equal(frames[:, 0], frames[:, 1])  # a full window has no copied frame


@pytest.mark.parametrize("pad", ["first", "last"])
@pytest.mark.parametrize("frames", [1, 5, 6, 9])
def test_padding_repeats_one_end_and_decoding_gives_the_very_frames_back(pad, frames):
    model, clip = build(Identity, multiple=4, offset=1, minimum=5, pad=pad), some_clip(frames)
    latent = model.encode(clip).mode()["clip"]
    length = {1: 5, 5: 5, 6: 9, 9: 9}[frames]
    assert latent.shape[2] == length
    edge = clip[:, :, [0 if pad == "first" else -1] * (length - frames)]
    assert torch.equal(latent, torch.cat([edge, clip] if pad == "first" else [clip, edge], 2))
    assert torch.equal(model.decode({"clip": latent}, frames), clip)
    assert torch.equal(model(clip).clip, clip)
    assert torch.equal(model.decode({"clip": latent}), latent)


def test_more_frames_than_the_latents_hold_are_refused():
    model = build(Identity)
    with pytest.raises(UserError, match="Expected at most 6 frames from these latents, got num_frames=7"):
        model.decode(model.encode(some_clip(6)).mode(), 7)


# Ranges, rates, arguments.


def test_a_model_works_in_its_own_range_of_values():
    class UnitRange(Identity):
        value_range = (0.0, 1.0)

    model, clip = build(UnitRange), some_clip()
    latents = model.encode(clip).mode()
    torch.testing.assert_close(latents["clip"], (clip + 1) / 2)
    torch.testing.assert_close(model.decode(latents), clip)
    ends = model.encode(torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 1, 2)).mode()["clip"]
    assert ends[0, 0, 0, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("frames", "kept"), [(5, 2), (6, 3), (9, 3), (16, 5)])
def test_padding_counts_in_the_rate(frames, kept):
    model, clip = build(Padded, channels=2), some_clip(frames)
    stored = model.encode(clip).mode()["patches"]
    assert stored[0].numel() == 2 * kept * 2 * 2
    assert model.compression_rate(clip.shape[1:]) == pytest.approx(stored[0].numel() / (3 * frames * 16 * 16))


@pytest.mark.parametrize(("cls", "frames", "kept"), [(Codes, 6, 6), (PaddedCodes, 6, 3), (PaddedCodes, 9, 3)])
@pytest.mark.parametrize("size", [8, 5])
def test_bits_per_pixel_are_those_of_the_codes_over_the_users_pixels(cls, frames, kept, size):
    model, clip = build(cls, codebook_size=size), some_clip(frames)
    by_hand = kept * 2 * 2 * math.log2(size) / (frames * 16 * 16)
    assert model.bits_per_pixel(clip.shape[1:]) == pytest.approx(by_hand)
    posterior = model.encode(clip)["patches"]
    assert posterior.bits == pytest.approx(by_hand * frames * 16 * 16)
    decoded = model.decode(model.dequantize({"patches": posterior.codes}), frames)
    torch.testing.assert_close(decoded, model(clip).clip)


def test_a_model_without_codebook_has_no_bits_and_nothing_to_dequantize():
    model = build(Patches)
    assert model.bits_per_pixel((3, 6, 16, 16)) is None
    with pytest.raises(UserError, match="Patches has no codebook"):
        model.dequantize({})


def test_training_decodes_a_sample_and_evaluation_the_mode():
    class Noisy(Patches):
        def _encode(self, clip):
            mean = self.down(clip)
            return Encoding(patches=DiagonalGaussian(mean, torch.zeros_like(mean)))

    model, clip = build(Noisy), some_clip()
    assert torch.equal(model(clip).latents["patches"], model.down(clip))
    sampled = model.train()(clip).latents["patches"] - model.down(clip)
    assert float(sampled.detach().std()) == pytest.approx(1, abs=0.3)


def test_a_reconstruction_keeps_what_the_encoder_said():
    encoded = []

    class Watched(Patches):
        def _encode(self, clip):
            encoded.append(super()._encode(clip))
            return encoded[-1]

    result = build(Watched)(some_clip())
    assert result.encoding is encoded[0]
    assert len(encoded) == 1


def test_spec_holds_every_argument_with_its_default():
    class Configured(Identity):
        def __init__(self, frames, levels=(3, 5), *, name="x", **more):
            super().__init__(minimum=frames)

    spec = Configured(4, depth=2).spec()
    assert spec["class_path"] == f"{__name__}.{Configured.__qualname__}"
    assert spec["init_args"] == {"frames": 4, "levels": [3, 5], "name": "x", "depth": 2}


@pytest.mark.parametrize(
    ("clip", "got"),
    [
        (torch.zeros(3, 6, 16, 16), "(3, 6, 16, 16) of torch.float32"),
        (torch.zeros(1, 6, 3, 16, 16), "(1, 6, 3, 16, 16) of torch.float32"),
        (torch.zeros(1, 3, 6, 16, 16, dtype=torch.uint8), "(1, 3, 6, 16, 16) of torch.uint8"),
    ],
    ids=["no batch", "frames before channels", "integers"],
)
def test_a_clip_of_the_wrong_kind_is_refused_with_what_came(clip, got):
    with pytest.raises(UserError) as error:
        build(Identity).encode(clip)
    assert str(error.value) == f"Expected a float clip of shape (B, 3, T, H, W) in [-1, 1], got {got}."


@pytest.mark.parametrize("latents", [{}, {"other": torch.zeros(1)}, {"clip": torch.zeros(1), "other": torch.zeros(1)}])
def test_decode_refuses_other_latents_than_its_own(latents):
    with pytest.raises(UserError) as error:
        build(Identity).decode(latents)
    assert str(error.value) == f"Expected latents ['clip'] for Identity, got {sorted(latents)}."


# The check itself.


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("cls", [Patches, Padded, Codes, PaddedCodes, Identity])
def test_models_that_keep_every_promise_pass(cls, frames):
    check_autoencoder(build(cls), frames, 16)


class Noisy(Patches):
    def _encode(self, clip):
        return Encoding(patches=Deterministic(self.down(clip) + torch.randn(())))


class BatchMean(Patches):
    def _encode(self, clip):
        latent = self.down(clip)
        return Encoding(patches=Deterministic(latent - latent.mean(0)))


class BatchMeanDecoder(Patches):
    def _decode(self, latents):
        return self.up(latents["patches"] - latents["patches"].mean(0))


class OtherName(Patches):
    def _encode(self, clip):
        return Encoding(z=Deterministic(self.down(clip)))


class OtherShape(Patches):
    def _latent_shapes(self, clip_shape):
        return {"patches": (1, *super()._latent_shapes(clip_shape)["patches"][1:])}


class OtherRate(Patches):
    def compression_rate(self, clip_shape):
        return super().compression_rate(clip_shape) / 2


class OtherSample(Patches):
    def _encode(self, clip):
        posterior = Deterministic(self.down(clip))
        posterior.sample = lambda: posterior.value[:, :, :1]
        return Encoding(patches=posterior)


class TermPerClip(Codes):
    def _encode(self, clip):
        encoding = super()._encode(clip)
        encoding["patches"].terms = {"commitment": torch.zeros(len(clip))}
        return encoding


class InfiniteTerm(Codes):
    def _encode(self, clip):
        encoding = super()._encode(clip)
        encoding["patches"].terms["commitment"] = torch.tensor(math.inf)
        return encoding


class NoCodes(Patches):
    def code_shapes(self, clip_shape):
        return {"patches": ((1,), 8)}


class OtherCodes(Codes):
    def code_shapes(self, clip_shape):
        return {"patches": ((1, 2, 3), 8)}


class CodesOutOfRange(Codes):
    def code_shapes(self, clip_shape):
        return {"patches": (super().code_shapes(clip_shape)["patches"][0], 2)}


class OtherVectors(Codes):
    def dequantize(self, codes):
        return {name: 2 * value for name, value in super().dequantize(codes).items()}


class HalfClip(Patches):
    def _decode(self, latents):
        return super()._decode(latents)[..., :8]


class NotANumber(Patches):
    def _decode(self, latents):
        return super()._decode(latents) / 0


class ForwardOfItsOwn(Patches):
    def forward(self, clip):
        result = super().forward(clip)
        result.clip = result.clip + 1
        return result


class Peeking(Patches):
    """Decodes what the encoder saw last: right for this clip, useless from a file."""

    def _encode(self, clip):
        self.features = self.down(clip).detach()
        return Encoding(patches=Deterministic(self.features))

    def _decode(self, latents):
        return self.up(self.features)


class Both(Patches):
    latent_names = ("patches", "more")
    partial_latents = True

    def _encode(self, clip):
        latent = Deterministic(self.down(clip))
        return Encoding(patches=latent, more=latent)

    def _decode(self, latents):
        return self.up(latents["patches"] + latents["more"])

    def _latent_shapes(self, clip_shape):
        return dict.fromkeys(self.latent_names, super()._latent_shapes(clip_shape)["patches"])


class SmallPart(Both):
    def _decode(self, latents):
        return super()._decode(latents) if len(latents) == 2 else torch.zeros(1)


class Argument(Patches):
    def __init__(self, activation=torch.relu):
        super().__init__()


class StateOutsideTheStateDict(Patches):
    def __init__(self):
        super().__init__()
        self.offset = torch.randn(3, 1, 1, 1)

    def _decode(self, latents):
        return super()._decode(latents) + self.offset


class TakesIntegers(Patches):
    def encode(self, clip):
        return super().encode(clip.float())


class TakesOneClip(Patches):
    def encode(self, clip):
        return super().encode(clip if clip.ndim == 5 else clip[None])


class TakesUnknownLatents(Patches):
    def decode(self, latents, num_frames=None):
        return super().decode({"patches": latents["patches"]}, num_frames)


class DeadParameter(Patches):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3))


class DropsALayer(Patches):
    def __init__(self):
        super().__init__()
        self.layer, self.passes = nn.Parameter(torch.zeros(())), 0

    def _decode(self, latents):
        self.passes += self.training and torch.is_grad_enabled()
        clip = super()._decode(latents)
        return clip + self.layer if self.training and self.passes > 2 else clip


class OtherLastLayer(Patches):
    @property
    def last_layer(self):
        return nn.Parameter(torch.zeros(3))


class FromTheLastEncode(Codes):
    """Codes are decoded from what the encoder saw last: right for this clip, useless from a file."""

    def _encode(self, clip):
        encoding = super()._encode(clip)
        self.seen = encoding.mode()
        return encoding

    def dequantize(self, codes):
        return self.seen


class NoStraightThrough(Codes):
    """The encoder learns from the commitment alone."""

    def _encode(self, clip):
        encoding = super()._encode(clip)
        encoding["patches"].value = self.dequantize({"patches": encoding["patches"].codes})["patches"]
        return encoding


class Gaussian(Patches):
    def __init__(self, channels=2):
        super().__init__(channels)
        self.spread = nn.Conv3d(3, channels, (1, 8, 8), stride=(1, 8, 8))

    def _encode(self, clip):
        return Encoding(patches=DiagonalGaussian(self.down(clip), self.spread(clip)))


class CutFromItsDecoder(Gaussian):
    """The encoder learns from the KL alone, though the decoder uses what it says."""

    def _decode(self, latents):
        return self.up(latents["patches"].detach())


class DeafDecoder(Gaussian):
    def __init__(self):
        super().__init__()
        self.colour = nn.Parameter(torch.randn(2, 1, 1, 1))

    def _decode(self, latents):
        return self.up(self.colour.expand_as(latents["patches"]))


class BlackFrame(Patches):
    def _decode(self, latents):
        return super()._decode(latents) * 0


class BiasAlone(Patches):
    def _decode(self, latents):
        return self.up(latents["patches"] * 0)


class NotANumberInTraining(Patches):
    def _decode(self, latents):
        decoded = super()._decode(latents)
        return decoded * math.nan if self.training else decoded


class NotANumberInGradients(Patches):
    def _decode(self, latents):
        return super()._decode(latents) + 0 * (self.up.weight * 0).sum().sqrt()


class WeightNorm(Patches):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.up)


class FrozenLastLayer(Patches):
    """Its decoder trains, but not where the gradients are compared."""

    def __init__(self):
        super().__init__()
        self.up.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("cls", "promise"),
    {
        OtherName: "encode() gives the latents of latent_names",
        OtherShape: "latent_shapes() is what encode() gives",
        OtherRate: "compression_rate() is measured from latents",
        Noisy: "mode() of patches is the same each time in evaluation",
        BatchMean: "patches of a clip does not depend on its batch",
        OtherSample: "sample() of patches has the shape of mode()",
        TermPerClip: "regularization commitment is a finite scalar",
        InfiniteTerm: "regularization commitment is a finite scalar",
        NoCodes: "code_shapes() names patches, whose posterior has no codes",
        OtherCodes: "codes of patches: claimed (1, 2, 3), got (4, 2, 2)",
        CodesOutOfRange: "codes of patches lie in 0..1",
        OtherVectors: "dequantize() of the codes of patches gives its latent back",
        HalfClip: "decode() gives the clip's shape (2, 3, 4, 16, 16), got (2, 3, 4, 16, 8)",
        NotANumber: "decode() gives finite pixels",
        ForwardOfItsOwn: "forward() in evaluation decodes the posteriors' modes",
        BatchMeanDecoder: "decode() of a clip does not depend on its batch",
        Peeking: "decode() depends on the latents alone",
        Both: "decode() of patches alone gives a clip, as partial_latents promises: KeyError('more')",
        SmallPart: "decode() of patches alone gives a clip, as partial_latents promises",
        Argument: "spec() of Argument holds plain values that can be stored",
        StateOutsideTheStateDict: "a model rebuilt from spec() and state_dict() decodes the same clip",
        TakesIntegers: "a clip of integers is refused with a UserError",
        TakesOneClip: "a clip without a batch axis is refused with a UserError",
        TakesUnknownLatents: "an unknown latent is refused with a UserError",
        DeadParameter: "every trainable parameter gets a gradient; these do not: ['unused']",
        DropsALayer: "every trainable parameter gets a gradient in each step; these do in some: ['layer']",
        OtherLastLayer: "last_layer is one of the trainable parameters",
        FromTheLastEncode: "dequantize() of the codes of patches gives its latent back",
        NoStraightThrough: "gradients go from patches back to the clip; its encoder learns from commitment alone",
        CutFromItsDecoder: "gradients go from the decoded clip back to patches",
        DeafDecoder: "decode() of other latents gives another clip",
        BlackFrame: "decode() of other latents gives another clip",
        BiasAlone: "decode() of other latents gives another clip",
        NotANumberInTraining: "the loss of a training step is finite, got nan",
        NotANumberInGradients: "gradients are finite; those of up.weight are not",
        WeightNorm: "last_layer is one of the trainable parameters; return the module's weight itself (under "
        "weight_norm: module.parametrizations.weight.original1)",
        FrozenLastLayer: "last_layer is one of the trainable parameters",
    }.items(),
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_promise_is_named(cls, promise):
    with pytest.raises(ContractError) as error:
        check_autoencoder(build(cls), 4, 16)
    assert str(error.value).startswith(promise)


# Sound models that look broken.


class LargeLatents(Patches):
    """Sums of about 1e4, which round otherwise in another batch by one part in a million, also where they are 0."""

    def _encode(self, clip):
        latent = 1e4 * self.down(clip)
        return Encoding(patches=Deterministic(latent + 1e-2 * (len(clip) > 1)))

    def _decode(self, latents):
        return self.up(latents["patches"] / 1e4)


class FlatNorm(Patches):
    """Makes much of rounding, as a norm of a constant map does; the rounding is other in another batch."""

    def _encode(self, clip):
        latent = self.down(clip)
        flat = 1 + 0 * latent + torch.finfo(latent.dtype).eps * len(clip)
        return Encoding(patches=Deterministic(latent + (flat - 1) * 1e3))


class FrozenDecoder(Patches):
    def __init__(self):
        super().__init__()
        self.up.requires_grad_(False)


class FrozenEncoder(Codes):
    """Without gradients, as a pretrained one; its codebook and decoder train."""

    def __init__(self):
        super().__init__()
        self.down.requires_grad_(False)

    def _encode(self, clip):
        encoding = super()._encode(clip)
        encoding["patches"].value = self.dequantize({"patches": encoding["patches"].codes})["patches"]
        return encoding


class NormedLastLayer(WeightNorm):
    @property
    def last_layer(self):
        return self.up.parametrizations.weight.original1


class LayerDrop(Patches):
    may_skip_parameters = True

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(2, 2, 1) for _ in range(4))

    def _decode(self, latents):
        latent = latents["patches"]
        for layer in self.layers:
            if not (self.training and torch.rand(()) < 0.5):
                latent = latent + layer(latent)
        return self.up(latent)


class ZeroHead(Patches):
    """Black before it is trained, as a head of zeros makes it."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)


@pytest.mark.parametrize(
    "cls",
    [LargeLatents, FlatNorm, FrozenDecoder, FrozenEncoder, NormedLastLayer, LayerDrop, ZeroHead, Gaussian],
)
def test_a_sound_model_passes_also_where_rounding_or_freezing_makes_it_look_broken(cls):
    check_autoencoder(build(cls), 4, 16)


def test_all_promises_are_asked_of_a_model_in_double_precision():
    for cls in (Patches, Codes, Gaussian):
        check_autoencoder(build(cls).double(), 4, 16)


def test_a_model_of_squares_alone_fails_with_the_attribute_to_set():
    class Squares(Patches):
        def _encode(self, clip):
            assert clip.shape[3] == clip.shape[4], "squares"
            return super()._encode(clip)

    with pytest.raises(ContractError, match=r"16 x 24 pixels .* a model of squares alone sets resolution"):
        check_autoencoder(build(Squares), 4, 16)


def test_a_training_step_that_fails_in_full_precision_is_not_asked_for_in_bfloat16():
    promises = list(check_promises(build(NotANumberInTraining), 4, 16))
    assert [promise.name for promise in promises if promise.passed is False] == [
        "every trainable parameter gets a gradient"
    ]
    skipped = {promise.name: promise.detail for promise in promises if promise.passed is None}
    assert skipped["training step in bfloat16"] == "it needs: every trainable parameter gets a gradient"


def test_the_check_leaves_the_model_as_it_was():
    class Normed(Patches):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm3d(2)

        def _encode(self, clip):
            return Encoding(patches=Deterministic(self.norm(self.down(clip))))

    for training in (True, False):
        model = build(Normed).train(training)
        model.up.bias.grad = torch.ones(3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        check_autoencoder(model, 4, 16)
        assert model.training is training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model.up.bias.grad, torch.ones(3))


def test_a_size_that_the_model_cannot_halve_often_enough_is_refused_with_what_it_takes():
    model = build(Patches)
    model.check_clip(torch.zeros(1, 3, 4, 16, 24))
    with pytest.raises(UserError, match=r"multiples of 8, got \(1, 3, 4, 16, 20\); set data\.resolution"):
        model.encode(torch.zeros(1, 3, 4, 16, 20))
