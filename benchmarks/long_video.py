"""Measure the memory of `vidtwin reconstruct` on a long video: python benchmarks/long_video.py VIDEO CKPT [-- OPTIONS]

VIDEO is repeated, packet by packet, until it is long enough. Prints the peak memory of the process, as counted by the
kernel, for one second and for the long video: the difference is the cost of length.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av

_PEAK = """
import resource, sys
from vidtwin.cli import main
code = main(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""


def repeat(source: Path, target: Path, seconds: float) -> int:
    """Copy the packets of a video repeatedly without decoding → number of frames."""
    frames, shift = 0, 0
    with av.open(str(target), "w") as output:
        stream = None
        while True:
            with av.open(str(source)) as container:
                video = container.streams.video[0]
                stream = stream or output.add_stream_from_template(video)
                begin = video.start_time or 0
                for packet in container.demux(video):
                    if packet.size == 0 or packet.pts is None or packet.dts is None:
                        continue
                    packet.pts, packet.dts = packet.pts - begin + shift, packet.dts - begin + shift
                    packet.stream = stream
                    output.mux(packet)
                    frames += 1
                shift += round(video.duration or 0)
                if shift * video.time_base >= seconds:
                    return frames


def measure(arguments: list[str]) -> tuple[int, float]:
    """Run a command of vidtwin → its peak memory in MB and its seconds."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _PEAK, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PEAK")]
    return int(line.split()[1]), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("options", nargs="*", help="Options of vidtwin reconstruct, after --.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in (("short", 1.0), ("long", 60 * given.minutes)):
            video = Path(folder) / f"{name}.mp4"
            frames = repeat(given.video, video, seconds)
            words = ["reconstruct", str(video), "--ckpt_path", given.checkpoint, "--out", os.path.join(folder, name)]
            megabytes, took = measure([*words, "--progress", "false", *given.options])
            print(f"{name}: {frames} frames, peak {megabytes} MB, {took:.0f} s")


if __name__ == "__main__":
    main()
