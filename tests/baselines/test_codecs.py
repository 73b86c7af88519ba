"""Codecs: the bytes are those of the stream, decode by themselves, and shrink with the quality."""

import io

import av
import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image

from vidtwin.baselines.codecs import DCT3D, JPEG, SVTAV1, X264, X265, Codec, Resize
from vidtwin.errors import UserError
from vidtwin.posteriors import Stream

VIDEO = [X264, X265, SVTAV1]
ALL: list[Codec] = [X264(30), X265(30), SVTAV1(40), JPEG(40), Resize(4), DCT3D(64, block=(4, 8, 8))]
NAMES = [type(codec).__name__ for codec in ALL]


def moving(frames: int = 8, height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth texture that moves by a pixel a frame, uint8 (T, H, W, 3)."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    wide = torch.nn.functional.interpolate(coarse, (height, width + frames), mode="bicubic").clamp(0, 1)[0]
    picture = (wide * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.stack([picture[:, t : t + width] for t in range(frames)])


FRAMES = moving()


def clip_of(*frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def psnr(made: np.ndarray, frames: np.ndarray = FRAMES) -> float:
    return -10 * np.log10(np.mean((made / 255.0 - frames / 255.0) ** 2) + 1e-12)


@pytest.mark.parametrize("codec", ALL, ids=NAMES)
def test_clips_of_a_batch_decode_from_their_bytes_alone(codec):
    clip = clip_of(FRAMES, FRAMES[::-1] // 2)
    encoding = codec.encode(clip)
    streams = Stream.unpack(encoding.mode()["stream"])
    assert [len(coded) for coded in streams] == encoding["stream"].sizes.tolist()
    made = codec.decode(encoding.mode(), 8)
    assert made.shape == clip.shape
    for coded, pixels in zip(streams, made, strict=True):
        frames = codec.decompress(coded)
        assert torch.equal(clip_of(frames)[0], pixels)
    assert psnr(codec.decompress(streams[0])) > 25
    assert streams == Stream.unpack(codec.encode(clip).mode()["stream"])  # the same bytes again
    assert codec.coding is not None
    assert codec.coding.numbers == (encoding["stream"].numbers.tolist() != encoding["stream"].sizes.tolist())


@pytest.mark.parametrize("codec", ALL[:3], ids=NAMES[:3])
def test_the_bytes_are_the_packets_and_a_file_of_them_alone_decodes_by_av(codec):
    coded = codec.compress(FRAMES)
    packets = codec.packets(FRAMES)
    assert coded == b"".join(packets)
    assert len(coded) == sum(map(len, packets))
    with av.open(io.BytesIO(coded), "r", format=codec.container) as container:
        planes = [frame.to_ndarray() for frame in container.decode(video=0)]
    context = av.CodecContext.create(codec.decoder, "r")
    parsed = [*context.parse(coded), *context.parse(b"")]
    own = [frame.to_ndarray() for packet in [*parsed, None] for frame in context.decode(packet)]
    assert len(planes) == len(own) == len(FRAMES)
    assert all(np.array_equal(one, other) for one, other in zip(planes, own, strict=True))
    assert b"x264" not in coded
    assert b"x265" not in coded


@pytest.mark.parametrize("kind", VIDEO)
@pytest.mark.parametrize("size", [(18, 20), (40, 50), (64, 64)])
def test_a_small_picture_has_the_same_bytes_each_time(kind, size):
    frames = moving(6, *size, seed=3)
    made = {kind(32).compress(frames) for _ in range(4)}
    assert len(made) == 1


@pytest.mark.parametrize(
    ("finer", "coarser"),
    [(kind(25), kind(40)) for kind in VIDEO]
    + [(JPEG(70), JPEG(20)), (Resize(4), Resize(8)), (DCT3D(256, 4.0), DCT3D(256, 40.0)), (DCT3D(96), DCT3D(8))],
)
def test_more_bytes_mean_less_error(finer, coarser):
    more, less = finer.compress(FRAMES), coarser.compress(FRAMES)
    assert len(more) > len(less)
    assert psnr(finer.decompress(more)) > psnr(coarser.decompress(less))


def test_jpeg_frames_are_those_of_files_and_smaller_by_the_tables():
    codec = JPEG(30)
    coded = codec.compress(FRAMES)
    files = []
    for picture in FRAMES:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format="JPEG", quality=30, subsampling="4:2:0")
        files.append(file)
    assert np.array_equal(codec.decompress(coded), np.stack([np.array(Image.open(file)) for file in files]))
    assert len(coded) < sum(len(file.getvalue()) for file in files)


@pytest.mark.parametrize("quality", range(1, 96))
def test_jpeg_decodes_at_every_quality(quality):
    # At 6 the tables hold 255, 217, the bytes of an end marker.
    frames = FRAMES[:2, :16, :16]
    assert JPEG(quality).decompress(JPEG(quality).compress(frames)).shape == frames.shape


def test_resize_keeps_the_means_of_blocks_without_loss():
    codec = Resize(8)
    small = FRAMES.reshape(8, 8, 8, 8, 8, 3).mean((2, 4))
    coded = codec.compress(FRAMES)
    assert codec.count(FRAMES, coded) == small.size
    stored = np.array(Image.open(io.BytesIO(coded[2:])).convert("RGB")).reshape(small.shape)
    assert np.abs(stored - small).max() <= 0.5
    tall = moving(257, 64, 1)  # 257 pictures of 64 rows are too many for one WebP
    assert np.array_equal(Resize(1).decompress(Resize(1).compress(tall)), tall)


def test_the_dct_is_scipys():
    codec = DCT3D(8, block=(4, 8, 2))
    blocks = torch.randn(5, 3, 4, 8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = codec.transform(blocks)
    assert ours.numpy() == pytest.approx(scipy.fft.dctn(blocks.numpy(), axes=(-3, -2, -1), norm="ortho"), abs=1e-12)
    assert codec.invert(ours).numpy() == pytest.approx(blocks.numpy(), abs=1e-12)


def test_the_dct_keeps_the_lowest_frequencies_and_all_of_them_lose_rounding_alone():
    whole = DCT3D(3 * 4 * 8 * 8, step=0.5, block=(4, 8, 8))
    assert np.abs(whole.decompress(whole.compress(FRAMES)).astype(int) - FRAMES).max() <= 1
    few = DCT3D(3, step=0.5, block=(8, 8, 8))  # the three means
    mean = FRAMES.reshape(8, 8, 8, 8, 8, 3).mean((0, 2, 4)).repeat(8, 0).repeat(8, 1)
    assert np.abs(few.decompress(few.compress(FRAMES)) - mean).max() < 1
    assert few.count(FRAMES, b"") == 3 * 64
    assert whole.count(FRAMES, b"abc") == 3  # all of the numbers are no rate
    flat = np.full_like(FRAMES, 128)
    assert len(few.compress(flat)) < 16


def test_a_build_without_an_encoder_is_refused_by_its_name(monkeypatch):
    def missing(name: str, mode: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(av, "Codec", missing)
    with pytest.raises(UserError, match="Expected libsvtav1 in PyAV's FFmpeg for SVT-AV1, got a build without it"):
        SVTAV1()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: X264(60), "crf of x264 from 1 to 51, got 60"),
        (lambda: X265(preset="fastest"), "preset of x265 to be one of ultrafast, .*, got 'fastest'"),
        (lambda: SVTAV1(pixel_format="yuv444p"), "pixel_format of SVT-AV1 to be one of yuv420p"),
        (lambda: JPEG(0), "quality of JPEG from 1 to 95"),
        (lambda: Resize(0), "factor of at least 1"),
        (lambda: DCT3D(0), "kept from 1 to 1536"),
        (lambda: X264().latent_shapes((3, 8, 64, 64)), "X264's streams depends on the clips"),
        (lambda: X265().compress(moving(4, 16, 32)), "frames of more than 16 pixels a side for x265, got 32 x 16"),
        (lambda: SVTAV1().compress(moving(4, 2, 2)), "frames that libsvtav1 takes, got 2 x 2 pixels"),
    ],
)
def test_wrong_arguments_are_refused(make, reason):
    with pytest.raises(UserError, match=reason):
        make()


def test_rows_that_differ_in_quality_alone_are_one_curve():
    def curve(codec: Codec) -> str:
        assert codec.coding is not None
        return codec.coding.curve

    assert curve(X264(20)) == curve(X264(40)) == "x264 medium"
    assert (
        len({curve(X264(preset="slow")), curve(X264(gop=8)), curve(X264(pixel_format="yuv444p")), curve(X264())}) == 4
    )
    assert curve(DCT3D(16, 2.0)) == curve(DCT3D(16, 8.0)) != curve(DCT3D(8, 8.0))
    assert curve(X264(fps=25.0)) == "x264 medium, 25 fps"
    assert curve(SVTAV1(30)) == "SVT-AV1 preset 6"
    assert curve(DCT3D(1536)) == "3-D DCT"
    assert curve(DCT3D(16, block=(4, 8, 16))) != curve(DCT3D(16, block=(8, 8, 8)))
    assert curve(JPEG(10)) == curve(JPEG(90)) != curve(JPEG(10, "4:4:4"))
    assert curve(Resize(2)) == curve(Resize(8))
