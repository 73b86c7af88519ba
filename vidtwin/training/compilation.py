"""Compile the networks of a training by torch.compile, unit by unit (`vidtwin.compilation`).

The units are those that FSDP2 shards. The LightningModule is never compiled.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from vidtwin.compilation import CompiledUnits, Mode, check_backend
from vidtwin.errors import UserError


class Compilation:
    """Choose what torch.compile compiles. The first steps take longer, by seconds to minutes.

    Args:
        parts: Networks to compile; None compiles all. An autoencoder's training has "autoencoder", "perceptual" and
            "discriminator" (not with `loss.r1_weight`, whose gradient of a gradient torch.compile lacks); that of a
            diffusion model has "denoiser".
        mode: Mode of torch.compile. "reduce-overhead" and "max-autotune" use CUDA graphs on a GPU.
        backend: Backend of torch.compile; "inductor" writes kernels, "aot_eager" none (to look for faults).

    Raises:
        UserError: `backend` is unknown.
    """

    def __init__(self, parts: list[str] | None = None, mode: Mode = "default", backend: str = "inductor") -> None:
        check_backend(backend, "trainer.compilation.backend")
        self.parts, self.mode, self.backend = parts, mode, backend
        self._compiled = CompiledUnits([])

    def compile(self, units: Mapping[str, Sequence[nn.Module]], all_parts: bool = True) -> None:
        """Compile the forward passes of units by the names of their parts, until `restore`.

        Args:
            units: The units.
            all_parts: Whether each chosen part has to be there.

        Raises:
            UserError: A chosen part is not there.
        """
        self.restore()
        if self.parts is not None and all_parts and (not self.parts or set(self.parts) - set(units)):
            raise UserError(f"Expected trainer.compilation.parts among {', '.join(units)}, got {self.parts}.")
        chosen = (unit for part in dict.fromkeys(self.parts or units) for unit in units.get(part, ()))
        self._compiled = CompiledUnits(chosen, self.mode, self.backend)

    def begin_step(self) -> None:
        """Begin a step: CUDA graphs may overwrite the outputs of earlier ones."""
        self._compiled.begin()

    def restore(self) -> None:
        """Undo `compile`."""
        self._compiled.restore()
