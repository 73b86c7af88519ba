"""Write a folder of small videos, some of them unusable."""

from pathlib import Path

import numpy as np

from vidtwin.video import write_video

BAD = {"empty.avi", "text.mp4", "half.avi", "damaged.mp4", "short.avi"}


def pictures(count: int, level: int = 0) -> list[np.ndarray]:
    """Draw moving noise above a bottom of one brightness, by which videos differ."""
    noise = np.random.default_rng(level).integers(0, 256, (32, 48 + 3 * count, 3), dtype=np.uint8)
    frames = [np.ascontiguousarray(noise[:, 3 * k : 3 * k + 48]) for k in range(count)]
    for frame in frames:
        frame[20:] = 40 + 15 * level
    return frames


def damage(path: Path, start: float, end: float) -> None:
    """Overwrite a part of a file, given as shares of its length, with noise."""
    content = bytearray(path.read_bytes())
    first, last = int(start * len(content)), int(end * len(content))
    content[first:last] = np.random.default_rng(0).integers(0, 256, last - first, dtype=np.uint8).tobytes()
    path.write_bytes(content)


def write_tree(root: Path) -> Path:
    """Write twelve intact videos, four broken ones of three kinds, and a short one."""
    for k in range(12):
        write_video(root / f"good{k}.avi", pictures(40, k), 25, "mpeg4")
    (root / "empty.avi").touch()
    (root / "text.mp4").write_text("no video " * 100)
    whole = write_video(root / "half.avi", pictures(40), 25, "mpeg4").read_bytes()
    (root / "half.avi").write_bytes(whole[: len(whole) // 2])
    damage(write_video(root / "damaged.mp4", pictures(40), 25), 0.1, 0.3)
    write_video(root / "short.avi", pictures(5), 25, "mpeg4")
    return root
