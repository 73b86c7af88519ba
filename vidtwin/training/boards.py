"""Write pictures to TensorBoard."""

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from vidtwin.video import Frames, panels


def boards_of(trainer: Trainer) -> list[TensorBoardLogger]:
    """Return the trainer's loggers that take pictures."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def add_clips(boards: list[TensorBoardLogger], tag: str, shown: dict[str, Frames], step: int, fps: float) -> None:
    """Log clips (T, H, W, 3) under their names, as a filmstrip and as an animation."""
    still, animation = panels.filmstrip(shown), panels.gif(panels.side_by_side(shown), fps)
    for board in boards:
        board.experiment.add_image(f"{tag}/frames", still, step, dataformats="HWC")
        _add_gif(board, f"{tag}/video", animation, step)


def _add_gif(logger: TensorBoardLogger, tag: str, encoded: bytes, step: int) -> None:
    # SummaryWriter.add_video needs moviepy to make the same GIF; the protocol buffer takes encoded bytes.
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(encoded_image_string=encoded, colorspace=3)
    writer = logger.experiment._get_file_writer()
    writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
