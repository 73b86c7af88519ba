"""Read and write video with PyAV. The only place with frames as uint8 (T, H, W, C).

source.py opens and probes videos; picture.py converts decoded frames to upright RGB; reading.py finds the frames shown
at given times; writing.py encodes; sound.py copies sound. These do not import torch.
"""

from .picture import COLOUR, COLOURS, RESIZE_FILTER, RESIZE_FILTERS, Frames, Resize, Size
from .reading import decode, iter_frames, read_clip, timed_frames
from .source import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Source,
    VideoError,
    VideoInfo,
    is_lasting,
    is_of_file,
    parse_rate,
    probe,
    survey,
)
from .writing import VideoWriter, write_video

__all__ = [
    "COLOUR",
    "COLOURS",
    "IMAGE_SUFFIXES",
    "RESIZE_FILTER",
    "RESIZE_FILTERS",
    "VIDEO_SUFFIXES",
    "Frames",
    "Resize",
    "Size",
    "Source",
    "VideoError",
    "VideoInfo",
    "VideoWriter",
    "decode",
    "is_lasting",
    "is_of_file",
    "iter_frames",
    "parse_rate",
    "probe",
    "read_clip",
    "survey",
    "timed_frames",
    "write_video",
]
