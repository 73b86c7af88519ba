"""Show the parts of a task and their parameters at the start of a training."""

import logging
from typing import Any

from lightning.pytorch.callbacks import ModelSummary

_logger = logging.getLogger(ModelSummary.__module__)


class Summary(ModelSummary):
    """Lightning's summary without its FLOPs, which are 0 unless it runs the model on an example of its own.

    `vidtwin test` counts those of `encode` and `decode`.
    """

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        columns = [[title, *map(str, cells)] for title, cells in summary_data if title != "FLOPs"]
        widths = [max(map(len, column)) for column in columns]
        lines = [
            " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in zip(*columns, strict=True)
        ]
        lines.insert(1, "-" * (sum(widths) + 3 * (len(widths) - 1)))
        lines.append(
            f"{trainable_parameters:,} of {total_parameters:,} parameters are trained; {model_size:,.1f} MB of weights"
        )
        _logger.info("\n" + "\n".join(lines))
