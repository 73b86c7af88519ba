"""Wrap encoder and decoder of an autoencoder as modules that torch.export can trace: tensors by name in and out."""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError, causes
from vidtwin.posteriors import Latents, Quantized

CODES = ".codes"
_OPERATOR = re.compile(r"(?:aten|prims|torchvision|quantized)[.:]+\w+(?:\.\w+)?")


class EncoderProgram(nn.Module):
    """clip (B, 3, T, H, W) → the modes of the latents by name, and `<name>.codes` of those with a codebook."""

    def __init__(self, model: VideoAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor) -> Latents:
        outputs = {}
        for name, posterior in self.model.encode(clip).items():
            outputs[name] = posterior.mode()
            if isinstance(posterior, Quantized):
                outputs[f"{name}{CODES}"] = posterior.codes
        return outputs


class DecoderProgram(nn.Module):
    """Latents by name → {"clip": (B, 3, T, H, W)}."""

    def __init__(self, model: VideoAutoencoder, num_frames: int) -> None:
        super().__init__()
        self.model, self.num_frames = model, num_frames

    def forward(self, latents: Latents) -> Latents:
        return {"clip": self.model.decode(latents, self.num_frames)}


@dataclass
class Part:
    """Part of the model to export: name, module and a batch of inputs by name."""

    name: str
    module: nn.Module
    inputs: Latents

    def arguments(self, inputs: Latents) -> tuple[Any]:
        return (inputs["clip"] if isinstance(self.module, EncoderProgram) else dict(inputs),)

    def axes(self) -> dict[str, Any]:
        batch = {0: Dim("batch", min=1)}
        if isinstance(self.module, EncoderProgram):
            return {"clip": batch}
        return {"latents": dict.fromkeys(self.inputs, batch)}


def trace(part: Part, inputs: Latents, dynamic: bool) -> tuple[ExportedProgram | None, str | None]:
    """Trace a part → the program or the reason of its failure; with `dynamic` for any number of clips."""
    try:
        with quiet(), torch.no_grad():
            axes = part.axes() if dynamic else None
            return torch.export.export(part.module, part.arguments(inputs), dynamic_shapes=axes), None
    except UserError:
        raise
    except Exception as error:  # torch.export raises many kinds
        return None, summarize_error(error)


def prune(program: ExportedProgram) -> ExportedProgram:
    """Empty the weights that the program does not use, so that the encoder's file does not hold the decoder."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    signature = program.graph_signature
    for inputs in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        for node, name in inputs.items():
            held = program.state_dict if name in program.state_dict else program.constants
            if node not in used and isinstance(value := held.get(name), Tensor):
                empty = value.new_empty(0)
                held[name] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
    return program


def summarize_error(error: BaseException) -> str:
    """Reduce an error to one line: the operator, if one is named, and the innermost reason."""
    chain = list(causes(error, contexts=True))
    texts = [re.sub(r"\x1b\[\d*m", "", str(each)) for each in chain]
    operator = next((match[0] for text in texts for match in [_OPERATOR.search(text)] if match), None)
    first = next((line.strip() for line in texts[-1].splitlines() if line.strip()), type(chain[-1]).__name__)
    where = f"operator {operator}: " if operator and operator not in first else ""
    return f"{where}{first.rstrip('.')}"


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporters' output about skipped passes."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
