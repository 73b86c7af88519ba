"""Read the windows of a shard of latents piece by piece, in constant memory."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from vidtwin.apply.inputs import Input
from vidtwin.apply.windows import Window, windows
from vidtwin.errors import UserError
from vidtwin.storage.latent_files import Manifest, Piece, StoredPiece
from vidtwin.video import VideoError


class PieceReader:
    """Read the windows of pieces in turn; a piece that follows the last one of its video needs no seeking.

    Attributes:
        fps: Frames per second of the current piece's video.
        damage: Reason why that video ended early; None if it has not.
    """

    def __init__(self, manifest: Manifest, inputs: Sequence[Input], side: int | None) -> None:
        self.manifest = manifest
        self.side = side
        self.length = int(manifest.settings["num_frames"])
        self.paths = {entry.name: entry.path for entry in inputs}
        self.fps = Fraction(1)
        self.damage: str | None = None
        self._at = (-1, 0)  # the video and the window that come next
        self._windows: Iterator[Window] = iter(())

    def reset(self) -> None:
        """Forget the place, after a piece that was not read to its end."""
        self._at = (-1, 0)

    def start(self, piece: Piece) -> StoredPiece:
        """Go to the first window of a piece."""
        video = self.manifest.videos[piece.video]
        self.fps = Fraction(video.fps)
        if self._at != (piece.video, piece.first_window):
            self.damage = None
            self._windows = windows(self.paths[video.name], self.length, self.side)
            self._at = (piece.video, 0)
            for _ in self._take(piece.first_window):
                pass
            self._at = (piece.video, piece.first_window)
        return StoredPiece(video.name, piece.first_window)

    def windows(self, piece: Piece) -> Iterator[Window]:
        """Yield the windows of the started piece; a video's last piece has all remaining ones."""
        planned = math.ceil(self.manifest.videos[piece.video].planned_frames / self.length)
        end = piece.first_window + piece.windows
        yield from self._take(None if end == planned else piece.windows)
        self._at = (piece.video, end)

    def _take(self, count: int | None) -> Iterator[Window]:
        while count is None or count > 0:
            try:
                yield next(self._windows)
            except StopIteration:
                return
            except VideoError as error:
                path = self.paths[self.manifest.videos[self._at[0]].name]
                if not error.lasting:  # a disk that fails for a moment must not leave a gap for good
                    raise UserError(
                        f"Expected to read {path}, got an error of the system: {error} Try again."
                    ) from error
                self.damage = str(error).removeprefix(f"{path}: ").rstrip(".")
                return
            count = None if count is None else count - 1
