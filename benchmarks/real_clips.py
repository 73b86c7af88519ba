"""Print how `VideoFolder` reads each file of a folder, as a table for docs/reading_videos.md.

    python benchmarks/real_clips.py ../shared/data/clips

For each file the evaluation clip of 16 frames at 8 fps: its frames and their size, or the reason why the file is
skipped. Every clip is decoded.
"""

import argparse
from pathlib import Path

from vidtwin.datamodules.clips import VideoClips
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, read_clip

FRAMES, FPS = 16, 8.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how VideoFolder reads each file of a folder.")
    parser.add_argument("root", type=Path)
    args = parser.parse_args()
    data = VideoFolder(
        str(args.root), val_fraction=0, test_fraction=1, num_frames=FRAMES, fps=FPS, num_workers=0, max_broken=1.0
    )
    loader = data.test_dataloader()
    starts = {n: int(s) for batch in loader for n, s in zip(batch["name"], batch["start_frame"], strict=True)}
    clips = data.dataset("test")
    assert isinstance(clips, VideoClips)
    infos = {video.name: video.info for video in clips.videos}
    print("| file | clip of 16 frames at 8 fps | shown as |")
    print("|---|---|---|")
    for path in sorted(path for path in args.root.rglob("*") if path.is_file()):
        name = path.relative_to(args.root).as_posix()
        info = infos.get(name)
        if name in starts and info is not None:
            start = starts[name]
            indices = [start + int(k * info.fps / int(FPS)) for k in range(FRAMES)]
            height, width = read_clip(path, 0, 1).shape[1:3]
            stored = "" if (width, height) == (info.width, info.height) else f", stored as {info.width}x{info.height}"
            seconds = start / float(info.fps)
            shown = f"frames {indices[0]}, {indices[1]}, … {indices[-1]} of {info.num_frames}, from {seconds:.2f} s"
            print(f"| {name} | {shown} | {width}x{height}{stored} |")
        elif name in data.skipped["test"]:
            print(f"| {name} | **skipped**: {data.skipped['test'][name]} | |")
        elif path.suffix.lower() not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            print(f"| {name} | ignored: `{path.suffix}` is not a video suffix | |")


if __name__ == "__main__":
    main()
