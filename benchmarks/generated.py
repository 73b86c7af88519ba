"""Hold generated videos against the real ones they were learned from (docs/generation.md).

    python benchmarks/generated.py generated path/to/UCF-101 --picture docs/images/generated.png

The folder is that of `vidtwin generate`, the other that of the encoded videos, a folder a class. It prints

    real     how many windows of groups that it has not seen a small classifier names right, with each of some strengths
             of noise on its training clips
    samples  how many samples a classifier with the best of these strengths, trained on all windows, takes for the class
             they were asked for
    PSNR     of each sample to the nearest window of its class, and to the nearest of another class; beside it that of
             each real window to the nearest of another video
    distance the Frechet distance of samples and windows by the features of EfficientNet-Lite0 (320 numbers of its last
             stage, means over 4 frames and all places); beside it that of as many real windows, drawn at random. It is
             no FVD and has another scale, but its weights come with a package

writes these to comparison.json in the folder, for benchmarks/generation_cost.py, and draws a sample of each class above
its nearest window. The classifier sees 4 frames of 16x16 pixels: place and colour, which a blurred sample has too, and
not detail. It is chosen and trained before it sees a sample.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vidtwin.apply.outputs import write_png
from vidtwin.apply.windows import VideoWindows
from vidtwin.files import write_text
from vidtwin.listing import find_group, find_videos
from vidtwin.losses.efficientnet import EfficientNetDistance
from vidtwin.metrics.fvd import frechet_distance, statistics
from vidtwin.video import Frames, iter_frames, panels

COMPARISON = "comparison.json"
NOISES = (0.1, 0.2, 0.4)  # standard deviations, of values from -1 to 1


def load_windows(root: Path, length: int, side: int, classes: list[str]) -> tuple[Frames, list[int], list[str]]:
    """Read all full windows of the classes' videos: uint8 (N, T, H, W, 3), labels, names."""
    clips, labels, names = [], [], []
    for path in tqdm(find_videos(root, image_folders=False)[0], desc="reading", unit="video"):
        if path.parent.name not in classes:
            continue
        for window in VideoWindows(path, length, side):
            if window.num_frames == length:
                clips.append(window.frames)
                labels.append(classes.index(path.parent.name))
                names.append(path.name)
    return np.stack(clips), labels, names


def load_samples(folder: Path) -> tuple[Frames, list[str]]:
    """Read generated videos: uint8 (N, T, H, W, 3), and the class of each."""
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    clips = [np.stack(list(iter_frames(folder / sample["file"]))) for sample in samples]
    return np.stack(clips), [sample["class"] for sample in samples]


def shrink(clips: Frames) -> Tensor:
    """Average to 4 frames of 16x16 pixels, in [-1, 1]: (N, 3, 4, 16, 16)."""
    values = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return F.adaptive_avg_pool3d(values, (4, 16, 16))


def train(clips: Tensor, labels: Tensor, num_classes: int, steps: int, noise: float, seed: int = 0) -> nn.Module:
    """Train a small 3-D CNN, with mirrored, brighter and noisier clips.

    Args:
        clips: (N, 3, 4, 16, 16) in [-1, 1].
        labels: int64 (N,).
        num_classes: Number of classes.
        steps: Steps of 64 clips.
        noise: Standard deviation of the noise on each number.
        seed: Seed of weights and draws.
    """
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv3d(3, 24, 3, padding=1), nn.GELU(), nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(24, 48, 3, padding=1), nn.GELU(), nn.MaxPool3d(2),
        nn.Conv3d(48, 64, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool3d((1, 2, 2)),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, num_classes),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    weight = 1 / torch.bincount(labels, minlength=num_classes).clamp_min(1)
    for step in tqdm(range(steps), desc=f"classifier, noise {noise}", unit="step"):
        chosen = torch.multinomial(weight[labels], 64, replacement=True)  # classes in equal shares
        batch = clips[chosen]
        batch = torch.where(torch.rand(64, 1, 1, 1, 1) < 0.5, batch.flip(-1), batch)
        batch = batch + 0.1 * torch.randn(64, 1, 1, 1, 1) + noise * torch.randn_like(batch)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels[chosen]).backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def name_classes(network: nn.Module, clips: Tensor) -> Tensor:
    return network(clips).argmax(1)


def choose(clips: Tensor, labels: Tensor, unseen: Tensor, num_classes: int, steps: int) -> tuple[float, list[float]]:
    """Train with each noise on the windows that are not `unseen`.

    Returns:
        The noise with the best mean over the classes of the share of unseen windows that are named right, and that mean
        of each noise.
    """
    means = []
    for noise in NOISES:
        found = name_classes(train(clips[~unseen], labels[~unseen], num_classes, steps, noise), clips[unseen])
        truth = labels[unseen]
        shares = [(found[truth == label] == label).float().mean() for label in truth.unique()]
        means.append(float(torch.stack(shares).mean()))
    return NOISES[means.index(max(means))], means


def hold_out(names: list[str], labels: list[int]) -> Tensor:
    """Choose the videos of the last group of each class: bool (N,)."""
    groups = [find_group(name) or 0 for name in names]
    last = {label: max(g for g, other in zip(groups, labels, strict=True) if other == label) for label in set(labels)}
    return torch.tensor([group == last[label] for group, label in zip(groups, labels, strict=True)])


@torch.no_grad()
def embed(clips: Frames) -> Tensor:
    """Return the mean of EfficientNet-Lite0's last features over 4 frames of each clip: (N, 320)."""
    distance = EfficientNetDistance()
    distance.load(download=False)
    assert distance.network is not None
    parts = nn.Sequential(*distance.network.parts.children())
    places = np.linspace(0, clips.shape[1] - 1, 4).round().astype(int)
    found = []
    for first in tqdm(range(0, len(clips), 8), desc="features", unit="batch"):
        frames = torch.from_numpy(clips[first : first + 8, places]).flatten(0, 1).permute(0, 3, 1, 2).float()
        found.append(parts((frames - 127) / 128).mean((2, 3)).unflatten(0, (-1, 4)).mean(1))
    return torch.cat(found)


def distances(ours: Frames, theirs: Frames) -> Tensor:
    """Compute the mean squared error of each pair of clips, of values from 0 to 1: (N, M)."""
    first, second = (torch.from_numpy(clips).flatten(1).float() / 255 for clips in (ours, theirs))
    return torch.cdist(first, second).square() / first.shape[1]


def psnr(error: Tensor) -> list[float]:
    return (-10 * error.clamp_min(1e-10).log10()).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generated", type=Path)
    parser.add_argument("root", type=Path, help="folder of the real videos")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="steps of the classifier")
    parser.add_argument("--shown", type=int, default=0, help="number of the sample of each class that is shown")
    arguments = parser.parse_args()

    samples, wanted = load_samples(arguments.generated)
    classes = sorted(set(wanted))
    asked = torch.tensor([classes.index(name) for name in wanted])
    real, labels, names = load_windows(arguments.root, samples.shape[1], samples.shape[2], classes)
    small, truth = shrink(real), torch.tensor(labels)
    print(f"{len(real):,} windows of {len(set(names))} videos in {len(classes)} classes; {len(samples)} samples")

    chance = f"chance {100 / len(classes):.0f}%"
    noise, means = choose(small, truth, hold_out(names, labels), len(classes), arguments.steps)
    shares = ", ".join(f"{100 * mean:.0f}% with noise {each}" for each, mean in zip(NOISES, means, strict=True))
    print(f"real windows of unseen groups named right: {shares}; {chance}")
    found = name_classes(train(small, truth, len(classes), arguments.steps, noise), shrink(samples))
    right = found == asked
    print(f"samples, by noise {noise}: {100 * right.float().mean():.0f}% named as their class, {chance}")
    for label, name in enumerate(classes):
        mine = asked == label
        counts = torch.bincount(found[mine], minlength=len(classes)).tolist()
        others = [f"{classes[other]} {count}" for other, count in enumerate(counts) if count and other != label]
        print(f"  {name}: {counts[label]} of {sum(counts)}" + (f"; {', '.join(others)}" if others else ""))

    error = distances(samples, real)
    same = truth[None] == asked[:, None]
    inside, outside = (psnr(error.masked_fill(mask, torch.inf).amin(1)) for mask in (~same, same))
    video = np.array(names)
    between = distances(real, real).masked_fill(torch.from_numpy(video[None] == video[:, None]), torch.inf)
    print(f"nearest window of the class: {fmean(inside):.1f} dB, of another: {fmean(outside):.1f} dB")
    print(f"real windows, nearest of another video: {fmean(psnr(between.amin(1))):.1f} dB")

    features = embed(real)
    drawn = features[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: len(samples)]]
    whole = statistics(features)
    far, near = (float(frechet_distance(*statistics(part), *whole)) for part in (embed(samples), drawn))
    print(f"Frechet distance by EfficientNet-Lite0: {far:.2f}; {len(drawn)} real windows: {near:.2f}")
    write_text(
        arguments.generated / COMPARISON,
        json.dumps({"named_right": float(right.float().mean()), "noise": noise, "frechet_distance": far}) + "\n",
    )

    if arguments.picture:
        shown: dict[str, Frames] = {}
        for label, name in enumerate(classes):
            place = int((asked == label).nonzero()[arguments.shown])
            nearest = int(error[place].masked_fill(truth != label, torch.inf).argmin())
            shown[f"{name},\ngenerated"] = samples[place]
            near = psnr(error[place, nearest][None])[0]
            shown[f"nearest clip\nof {name},\n{near:.1f} dB"] = real[nearest]
        write_png(arguments.picture, panels.filmstrip(shown, 4))
        print(f"picture -> {arguments.picture}")


if __name__ == "__main__":
    main()
