"""The contract of a video autoencoder, as a check that any plug-in can run on its own class."""

import copy
import io
import math

import torch
from torch import Tensor

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError


class ContractError(AssertionError):
    """A model breaks the interface; the message says which promise, what was expected and what came."""


def check_autoencoder(model: VideoAutoencoder, num_frames: int = 16, resolution: int = 64, batch_size: int = 2) -> None:
    """Run `model` through every promise of `VideoAutoencoder`; raises `ContractError` at the first broken one.

    Use a small configuration: it runs several forward passes and a backward pass on the model's device. The model's
    weights, buffers, gradients and mode are left as they were.

    Args:
        model: The autoencoder.
        num_frames: T of the clip.
        resolution: H = W of the clip, where the model itself fixes none.
        batch_size: B of the clip; each clip must be treated on its own.
    """
    training = model.training
    generator = torch.Generator().manual_seed(0)
    side = model.resolution or resolution
    device = next(iter(model.parameters()), torch.zeros(())).device
    clip = (torch.rand(batch_size, 3, num_frames, side, side, generator=generator) * 2 - 1).to(device)
    try:
        model.eval()
        with torch.no_grad():
            latents = _check_latents(model, clip)
            _check_decoding(model, clip, latents)
            _check_saving(model, clip, latents)
        _check_refusals(model, clip, latents)
        _check_gradients(copy.deepcopy(model).train(), clip)  # a copy: training moves batch norms and codebooks
    finally:
        model.train(training)


def _require(condition: bool, promise: str) -> None:
    if not condition:
        raise ContractError(promise)


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-5)


def _check_latents(model: VideoAutoencoder, clip: Tensor) -> dict[str, Tensor]:
    encoding = model.encode(clip)
    latents = encoding.mode()
    _require(
        tuple(latents) == tuple(model.latent_names),
        f"encode() gives the latents of latent_names: expected {model.latent_names}, got {tuple(latents)}",
    )
    shapes = {name: tuple(latent.shape[1:]) for name, latent in latents.items()}
    claimed = model.latent_shapes(clip.shape[1:])
    _require(shapes == claimed, f"latent_shapes() is what encode() gives: claimed {claimed}, got {shapes}")
    numbers = sum(latent[0].numel() for latent in latents.values())
    rate = model.compression_rate(clip.shape[1:])
    measured = numbers / clip[0].numel()
    _require(math.isclose(rate, measured), f"compression_rate() is measured from latents: {rate} is not {measured}")
    for name, latent in model.encode(clip).mode().items():
        _require(torch.equal(latent, latents[name]), f"mode() of {name} is the same each time in evaluation")
    for name, latent in model.encode(clip[:1]).mode().items():
        _require(_same(latent, latents[name][:1]), f"{name} of a clip does not depend on its batch")
    for name, sample in encoding.sample().items():
        _require(sample.shape == latents[name].shape, f"sample() of {name} has the shape of mode()")
    for name, term in encoding.regularization().items():
        _require(term.ndim == 0 and bool(term.isfinite()), f"regularization {name} is a finite scalar, got {term}")
    for name, (shape, size) in model.code_shapes(clip.shape[1:]).items():
        codes = getattr(encoding[name], "codes", None)
        if codes is None:
            raise ContractError(f"code_shapes() names {name}, whose posterior has no codes")
        _require(tuple(codes.shape[1:]) == shape, f"codes of {name}: claimed {shape}, got {tuple(codes.shape[1:])}")
        _require(int(codes.max()) < size and int(codes.min()) >= 0, f"codes of {name} lie in 0..{size - 1}")
    if bits := model.bits_per_pixel(clip.shape[1:]):
        codes = {name: encoding[name].codes for name in latents}  # type: ignore[attr-defined]
        for name, latent in model.dequantize(codes).items():
            _require(_same(latent, latents[name]), f"dequantize() of the codes of {name} gives its latent back")
        _require(bits > 0, f"bits_per_pixel() is positive, got {bits}")
    return latents


def _check_decoding(model: VideoAutoencoder, clip: Tensor, latents: dict[str, Tensor]) -> None:
    model.encode(clip)  # so that a decoder which peeks at its encoder's state sees the right one first
    decoded = model.decode(latents, clip.shape[2])
    _require(
        decoded.shape == clip.shape, f"decode() gives the clip's shape {tuple(clip.shape)}, got {tuple(decoded.shape)}"
    )
    _require(bool(decoded.isfinite().all()), "decode() gives finite pixels")
    model.encode(clip.flip(0) * 0.5)
    again = copy.deepcopy(model).decode(latents, clip.shape[2])
    _require(_same(again, decoded), "decode() depends on the latents alone, not on what was encoded before")
    alone = model.decode({name: latent[:1] for name, latent in latents.items()}, clip.shape[2])
    _require(_same(alone, decoded[:1]), "decode() of a clip does not depend on its batch")
    _require(_same(model(clip).clip, decoded), "forward() in evaluation decodes the posteriors' modes")
    if model.partial_latents:
        for name, latent in latents.items():
            promise = f"decode() of {name} alone gives a clip, as partial_latents promises"
            try:
                part = model.decode({name: latent}, clip.shape[2])
            except Exception as error:
                raise ContractError(f"{promise}: {error!r}") from error
            _require(part.shape == clip.shape, promise)


def _check_saving(model: VideoAutoencoder, clip: Tensor, latents: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "spec": model.spec()}, buffer)
    buffer.seek(0)
    try:
        loaded = torch.load(buffer, weights_only=True)
    except Exception as error:
        raise ContractError(
            f"spec() of {type(model).__name__} holds plain values that can be stored: {error}"
        ) from error
    rebuilt = type(model)(**loaded["spec"]["init_args"]).to(clip.device).eval()
    rebuilt.load_state_dict(loaded["state_dict"])
    _require(
        _same(rebuilt.decode(latents, clip.shape[2]), model.decode(latents, clip.shape[2])),
        "a model rebuilt from spec() and state_dict() decodes the same clip",
    )


def _check_refusals(model: VideoAutoencoder, clip: Tensor, latents: dict[str, Tensor]) -> None:
    for wrong, call in {
        "a clip without a batch axis": lambda: model.encode(clip[0]),
        "a clip of integers": lambda: model.encode(clip.to(torch.uint8)),
        "an unknown latent": lambda: model.decode({**latents, "unknown": clip}),
    }.items():
        try:
            call()
        except UserError:
            continue
        raise ContractError(f"{wrong} is refused with a UserError")


def _check_gradients(model: VideoAutoencoder, clip: Tensor) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        return
    _require(any(model.last_layer is p for p in parameters.values()), "last_layer is one of the trainable parameters")
    model.zero_grad(set_to_none=True)
    result = model(clip)
    terms = sum(result.regularization.values(), start=torch.zeros((), device=clip.device))
    ((result.clip - clip).square().mean() + terms).backward()
    dead = [name for name, p in parameters.items() if p.grad is None]
    _require(not dead, f"every trainable parameter gets a gradient; these do not: {dead[:5]}")
