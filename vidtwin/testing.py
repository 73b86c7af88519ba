"""Tests of the contract of `VideoAutoencoder`, for models and plug-ins.

    check_promises(model) ── one Promise (kept, broken or skipped) after the other ──> `vidtwin check NAME`
    check_autoencoder(model) ── ContractError at the first broken one ──> tests

Each promise is a function below, in the order of the checks. A promise is skipped if one that it needs is broken, so
that a model with one mistake gets one message.
"""

import copy
import io
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError, few
from vidtwin.posteriors import Encoding, Latents, Posterior, Quantized


class ContractError(AssertionError):
    """A model breaks the contract; the message gives the promise, the expected and the actual value."""


@dataclass(frozen=True)
class Promise:
    """The outcome of one promise.

    Attributes:
        name: The promise.
        passed: True if kept, False if broken, None if skipped.
        detail: Reason if broken or skipped.
        error: The exception that the model's own code raised, if any.
    """

    name: str
    passed: bool | None
    detail: str = ""
    error: Exception | None = None


def check_autoencoder(
    model: VideoAutoencoder, num_frames: int | None = None, resolution: int | Sequence[int] = 64, batch_size: int = 2
) -> None:
    """Check every promise of `VideoAutoencoder` and raise `ContractError` at the first broken one.

    Use a small configuration: the check runs a few dozen forward and some backward passes on the model's device. It
    preserves the model's weights, buffers, gradients and mode, and torch's random state.

    Args:
        model: The autoencoder.
        num_frames: T of the clip; by default the model's usual length.
        resolution: H = W of the clip in pixels, or (H, W), if the model has no fixed resolution.
        batch_size: B of the clip, at least 2 to see that clips do not depend on their batch.

    Raises:
        ContractError: A promise is broken.
        UserError: The model does not take such a clip.
    """
    for promise in check_promises(model, num_frames, resolution, batch_size):
        if promise.passed is False:
            raise ContractError(promise.detail) from promise.error


def check_promises(
    model: VideoAutoencoder,
    num_frames: int | None = None,
    resolution: int | Sequence[int] = 64,
    batch_size: int = 2,
) -> Iterator[Promise]:
    """Check every promise in turn and yield its outcome, continuing after a broken one.

    Arguments as for `check_autoencoder`. Raises `UserError` at once if the model does not take such a clip.
    """
    if batch_size < 2:
        raise UserError(
            f"Expected a batch of at least 2 clips, to see that each is treated on its own; got {batch_size}."
        )
    num_frames = model.temporal.usual_length if num_frames is None else num_frames
    size = model.resolution or resolution
    height, width = (size, size) if isinstance(size, int) else size
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shape = (batch_size, 3, num_frames, height, width)
    clip = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1
    model.check_clip(clip)
    model.temporal.legal_length(num_frames)
    return _run_all(_Check(model, clip.to(weight.device)))


@dataclass
class _Check:
    """The model, the clip, and results of the first promises that later ones reuse."""

    model: VideoAutoencoder
    clip: Tensor
    encoding: Encoding = field(default_factory=Encoding)
    latents: Latents = field(default_factory=dict)
    decoded: Tensor = field(default_factory=lambda: torch.zeros(0))
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = {name: value.detach().clone() for name, value in _iterate_tensors(self.model)}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(3, T, H, W)."""
        channels, frames, height, width = self.clip.shape[1:]
        return channels, frames, height, width

    def other_clip(self, frames: int, height: int, width: int) -> Tensor:
        """Crop or repeat the first clip to (1, 3, frames, height, width)."""
        _, whole_t, whole_h, whole_w = self.shape
        t, h, w = (torch.arange(n) % whole for n, whole in ((frames, whole_t), (height, whole_h), (width, whole_w)))
        return self.clip[:1, :, t][:, :, :, h][..., w]

    def codes(self) -> Latents:
        """Return the codes of the discrete latents."""
        return {name: posterior.codes for name, posterior in self.encoding.items() if isinstance(posterior, Quantized)}

    def same(self, first: Tensor, second: Tensor) -> bool:
        """Return whether two tensors are equal up to rounding."""
        # Convolutions on accelerators may round to TF32, and their order of summation may depend on the batch.
        rtol, atol = (1e-4, 1e-5) if self.clip.device.type == "cpu" else (1e-2, 1e-2)
        if second.numel():  # a small sum of large numbers inherits their rounding error
            atol *= max(1.0, float(second.detach().abs().max()))
        return first.shape == second.shape and torch.allclose(first, second, rtol=rtol, atol=atol)

    def same_latent(self, first: Posterior, second: Posterior, rows: slice = slice(None)) -> bool:
        """Return whether `first` equals `second[rows]`; a few codes may differ, since rounding breaks ties."""
        if isinstance(first, Quantized) and isinstance(second, Quantized):
            if first.codes.shape != second.codes[rows].shape:
                return False
            share = 0.01 if self.clip.device.type == "cpu" else 0.1
            return float((first.codes != second.codes[rows]).double().mean()) <= share
        return self.same(first.mode(), second.mode()[rows])


_Test = Callable[[_Check], None]
_PROMISES: dict[str, tuple[_Test, tuple[str, ...]]] = {}


class _NotApplicableError(Exception):
    """The promise does not apply to this model; the message says why."""


def _promise(name: str, *needs: str) -> Callable[[_Test], _Test]:
    """Register a promise that is checked only if all of `needs` are kept."""

    def register(test: _Test) -> _Test:
        _PROMISES[name] = (test, needs)
        return test

    return register


def _run_all(check: _Check) -> Iterator[Promise]:
    outcomes: dict[str, Promise] = {}
    try:
        for name, (test, needs) in _PROMISES.items():
            unmet = [outcomes[need] for need in needs if not outcomes[need].passed]
            if unmet:
                reason = unmet[0].detail if unmet[0].passed is None else f"it needs: {unmet[0].name}"
                outcomes[name] = Promise(name, None, reason)
            else:
                outcomes[name] = _run(check, name, test)
            yield outcomes[name]
    finally:
        _restore(check)


def _run(check: _Check, name: str, test: _Test) -> Promise:
    try:
        with _evaluation_mode(check.model), torch.no_grad():
            test(check)
    except _NotApplicableError as reason:
        return Promise(name, None, str(reason))
    except ContractError as error:
        cause = error.__cause__
        return Promise(name, False, str(error), cause if isinstance(cause, Exception) else None)
    except Exception as error:
        return Promise(name, False, f"{name}: {describe(error)}", error)
    return Promise(name, True)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Enter evaluation mode; restore each module's mode and torch's random state afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str)):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def describe(error: BaseException) -> str:
    """Format an error with the innermost line of the model's own code: `TypeError('…'), raised at file.py:12`."""
    frames = [
        (frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    own = [
        (file, line)
        for module, file, line in frames
        if module.partition(".")[0] not in ("torch", "einops", "importlib", "jsonargparse")
        and module not in ("vidtwin.testing", "vidtwin.autoencoder", "vidtwin.cli.check", "vidtwin.plugins")
        and not file.startswith("<")
    ]
    if not own:
        return repr(error)
    path, line = Path(own[-1][0]), own[-1][1]
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{error!r}, raised at {path}:{line}"


def _require(condition: bool, promise: str) -> None:
    if not condition:
        raise ContractError(promise)


@contextmanager
def _expect_success(promise: str) -> Iterator[None]:
    """Convert any exception of the model to a `ContractError` about `promise`."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{promise}: {describe(error)}") from error


def _iterate_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _find_changed(check: _Check) -> list[str]:
    now = dict(_iterate_tensors(check.model))

    def is_same(name: str, before: Tensor) -> bool:
        after = now.get(name)
        return after is not None and after.shape == before.shape and torch.allclose(after, before, 0, 0, equal_nan=True)

    return [name for name, before in check.state.items() if not is_same(name, before)]


def _restore(check: _Check) -> None:
    now = dict(_iterate_tensors(check.model))
    with torch.no_grad():
        for name in _find_changed(check):
            if name in now and now[name].shape == check.state[name].shape:
                now[name].copy_(check.state[name])


# Encoding.


@_promise("encode returns the named latents")
def _check_names(check: _Check) -> None:
    check.encoding = check.model.encode(check.clip)
    check.latents = check.encoding.mode()
    wanted, got = check.model.latent_names, tuple(check.latents)
    _require(
        got == tuple(wanted),
        f"encode() gives the latents of latent_names: expected {wanted}, got {got}; "
        "_encode() returns Encoding(name=posterior, ...) in that order",
    )


@_promise("latent shapes", "encode returns the named latents")
def _check_shapes(check: _Check) -> None:
    shapes = {name: tuple(latent.shape[1:]) for name, latent in check.latents.items()}
    claimed = check.model.latent_shapes(check.shape)
    _require(
        shapes == claimed,
        f"latent_shapes() is what encode() gives: claimed {claimed}, got {shapes}; the claim is _latent_shapes()",
    )


@_promise("compression rate", "encode returns the named latents")
def _check_rate(check: _Check) -> None:
    rate = check.model.compression_rate(check.shape)
    measured = sum(latent[0].numel() for latent in check.latents.values()) / check.clip[0].numel()
    _require(
        math.isclose(rate, measured),
        f"compression_rate() is measured from latents: {rate} is not {measured}; "
        "leave the method to the base class and correct _latent_shapes()",
    )


@_promise("encode is deterministic in evaluation", "encode returns the named latents")
def _check_determinism(check: _Check) -> None:
    latents = check.model.encode(check.clip).mode()
    for name, latent in check.model.encode(check.clip).mode().items():
        _require(
            torch.equal(latent, latents[name]),
            f"mode() of {name} is the same each time in evaluation; draw random numbers in sample() or under "
            "self.training alone",
        )


@_promise("posterior samples and regularization terms", "encode returns the named latents")
def _check_posteriors(check: _Check) -> None:
    for name, sample in check.encoding.sample().items():
        wanted = tuple(check.latents[name].shape)
        _require(
            sample.shape == wanted, f"sample() of {name} has the shape of mode(): {wanted}, got {tuple(sample.shape)}"
        )
    for name, term in check.encoding.regularization().items():
        _require(
            term.ndim == 0 and bool(term.isfinite()),
            f"regularization {name} is a finite scalar, got {term}; take the mean over the batch",
        )


@_promise("codes and codebook sizes", "encode returns the named latents")
def _check_codes(check: _Check) -> None:
    claimed = check.model.code_shapes(check.shape)
    for name in check.codes():
        _require(name in claimed, f"code_shapes() names {name}, whose posterior is Quantized: it names {list(claimed)}")
    for name, (shape, size) in claimed.items():
        posterior = check.encoding.get(name)
        if not isinstance(posterior, Quantized):
            raise ContractError(f"code_shapes() names {name}, whose posterior has no codes: expected Quantized")
        codes = posterior.codes
        got = tuple(codes.shape[1:])
        _require(got == tuple(shape), f"codes of {name}: claimed {tuple(shape)}, got {got}; the claim is code_shapes()")
        _require(not codes.is_floating_point(), f"codes of {name} are integers, got {codes.dtype}")
        low, high = int(codes.min()), int(codes.max())
        _require(
            low >= 0 and high < size,
            f"codes of {name} lie in 0..{size - 1}, got {low}..{high}; code_shapes() gives the codebook's size",
        )
        _require(
            posterior.codebook_size == size,
            f"codebook_size of {name} is {posterior.codebook_size} in the posterior, but {size} in code_shapes()",
        )
    if not claimed:
        raise _NotApplicableError("no latent is discrete")


@_promise("bits per pixel", "encode returns the named latents", "codes and codebook sizes")
def _check_bits(check: _Check) -> None:
    bits = check.model.bits_per_pixel(check.shape)
    if set(check.codes()) != set(check.latents):
        _require(bits is None, f"bits_per_pixel() is None where a latent is not discrete, got {bits}")
        raise _NotApplicableError(f"of {few(sorted(check.latents))} not all are discrete")
    codes = [posterior for posterior in check.encoding.values() if isinstance(posterior, Quantized)]
    measured = sum(posterior.bits for posterior in codes) / math.prod(check.shape[1:])
    _require(
        bits is not None and math.isclose(bits, measured),
        f"bits_per_pixel() is measured from codes: {bits} is not {measured}; correct code_shapes()",
    )


# Decoding.


@_promise("decode returns the shape of the clip", "encode returns the named latents")
def _check_decoding(check: _Check) -> None:
    decoded = check.model.decode(check.latents, check.shape[1])
    wanted, got = tuple(check.clip.shape), tuple(decoded.shape)
    _require(got == wanted, f"decode() gives the clip's shape {wanted}, got {got}")
    finite = float(decoded.isfinite().double().mean())
    _require(finite == 1, f"decode() gives finite pixels, got {1 - finite:.1%} that are not")
    check.decoded = decoded


@_promise("decode needs only the codes", "codes and codebook sizes", "decode returns the shape of the clip")
def _check_from_codes(check: _Check) -> None:
    check.model.encode(check.clip.flip(0) * 0.5)  # so that no state kept from encoding the clip helps
    vectors = check.model.dequantize(check.codes())
    wanted = sorted(check.codes())
    _require(sorted(vectors) == wanted, f"dequantize() gives the latents of its codes {wanted}, got {sorted(vectors)}")
    for name, latent in vectors.items():
        _require(
            check.same(latent, check.latents[name]),
            f"dequantize() of the codes of {name} gives its latent back: expected shape "
            f"{tuple(check.latents[name].shape)}, got {tuple(latent.shape)} or other values",
        )
    decoded = check.model.decode({**check.latents, **vectors}, check.shape[1])
    difference = float((decoded - check.decoded).abs().max())
    _require(
        check.same(decoded, check.decoded),
        f"decode() of dequantize() of the codes gives the same clip, got pixels that differ by {difference:.2g}; a "
        "straight-through z + (e - z).detach() rounds, e.detach() + (z - z.detach()) does not",
    )


@_promise("decode needs only the latents", "decode returns the shape of the clip")
def _check_from_latents(check: _Check) -> None:
    model, frames = check.model, check.shape[1]
    model.encode(check.clip)  # so that a decoder that reads its encoder's state first sees the right one
    decoded = model.decode(check.latents, frames)
    _require(
        check.same(model.decode(check.latents, frames), decoded),
        "decode() of the same latents is the same each time in evaluation; draw no random numbers there",
    )
    model.encode(check.clip.flip(0) * 0.5)
    again = copy.deepcopy(model).decode(check.latents, frames)
    _require(
        check.same(again, decoded),
        "decode() depends on the latents alone, not on what was encoded before; make what it needs a latent",
    )


@_promise("decode uses the latents", "decode returns the shape of the clip")
def _check_use_of_latents(check: _Check) -> None:
    # Noise on the weights, since a last layer may be initialized to 0.
    model, random = copy.deepcopy(check.model), torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=random).to(like)

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(noise(parameter), alpha=0.02)
    latents = {name: latent for name, latent in check.latents.items() if latent.is_floating_point()}
    others = {name: latent + noise(latent) * (1 + latent.abs()) for name, latent in latents.items()}
    if not others:
        raise _NotApplicableError("no latent is of floating point")
    decoded, other = (model.decode({**check.latents, **given}, check.shape[1]) for given in (latents, others))
    kept = "one colour" if bool((decoded == decoded.flatten()[0]).all()) else "the same clip"
    _require(
        not torch.equal(decoded, other),
        f"decode() of other latents gives another clip, got {kept} whatever the latents; let _decode() use them",
    )


@_promise("forward decodes the modes in evaluation", "decode returns the shape of the clip")
def _check_forward(check: _Check) -> None:
    _require(
        check.same(check.model(check.clip).clip, check.decoded),
        "forward() in evaluation decodes the posteriors' modes; leave it to the base class",
    )


@_promise("clips are independent of their batch", "decode returns the shape of the clip")
def _check_batch(check: _Check) -> None:
    dependent = _find_batch_dependence(check, check.model, check.clip)
    if dependent and check.clip.device.type == "cpu" and check.clip.dtype == torch.float32:
        # Normalizing a constant map amplifies rounding. Double precision removes that, but not a real dependence.
        with suppress(Exception):  # the model may support single precision only
            dependent = _find_batch_dependence(check, copy.deepcopy(check.model).double(), check.clip.double())
    _require(
        not dependent,
        f"{dependent} of a clip does not depend on its batch; normalize over a clip's own axes, not over the batch",
    )


def _find_batch_dependence(check: _Check, model: VideoAutoencoder, clip: Tensor) -> str:
    """Return the latent or method whose result for the first clip depends on its batch, or an empty string."""
    first, frames = slice(0, 1), check.shape[1]
    encoding = model.encode(clip)
    latents = encoding.mode()
    decoded = model.decode(latents, frames)
    for name, posterior in model.encode(clip[first]).items():
        if not check.same_latent(posterior, encoding[name], first):
            return name
    alone = model.decode({name: latent[first] for name, latent in latents.items()}, frames)
    return "" if check.same(alone, decoded[first]) else "decode()"


@_promise("latents decode separately", "decode returns the shape of the clip")
def _check_partial(check: _Check) -> None:
    if not check.model.partial_latents:
        raise _NotApplicableError("partial_latents is False")
    for name, latent in check.latents.items():
        promise = f"decode() of {name} alone gives a clip, as partial_latents promises"
        with _expect_success(promise):
            part = check.model.decode({name: latent}, check.shape[1])
        wanted = tuple(check.clip.shape)
        _require(part.shape == wanted, f"{promise}: expected {wanted}, got {tuple(part.shape)}")


# Legal clips.


@_promise("value range", "decode returns the shape of the clip")
def _check_range(check: _Check) -> None:
    model, (low, high) = check.model, check.model.value_range
    _require(low < high, f"value_range is (lowest, highest), got {model.value_range}")
    clip = check.clip.clone()
    clip[:, :, :, 0, 0], clip[:, :, :, -1, -1] = -1, 1
    seen: list[Tensor] = []
    with _watch_method(model, "_encode", lambda value, result: seen.append(value)):
        latents = model.encode(clip).mode()
    with _watch_method(model, "_decode", lambda value, result: seen.append(result)):
        decoded = model.decode(latents)
    if len(seen) != 2:
        raise ContractError(
            "encode() and decode() call _encode() and _decode() once each; leave them to the base class"
        )
    given, raw = seen
    ends = (float(given.min()), float(given.max()))
    _require(
        all(math.isclose(end, wanted, abs_tol=1e-4) for end, wanted in zip(ends, (low, high), strict=True)),
        f"_encode() gets pixels of value_range {low} to {high} where the clip's are -1 to 1, got {ends[0]:.4g} to "
        f"{ends[1]:.4g}; set value_range, and leave encode() to the base class",
    )
    _require(
        check.same(decoded, (raw - low) / (high - low) * 2 - 1),
        f"decode() maps what _decode() gives from value_range {low} to {high} to -1 to 1; leave it to the base class",
    )


@contextmanager
def _watch_method(model: nn.Module, name: str, watch: Callable[[Tensor, Tensor], object]) -> Iterator[None]:
    """Call `watch` with the argument and the result of each call of a method."""
    method = getattr(model, name)

    def watched(value: Tensor) -> Tensor:
        result = method(value)
        watch(value, result)
        return result

    object.__setattr__(model, name, watched)
    try:
        yield
    finally:
        object.__delattr__(model, name)


@_promise("clip lengths", "latent shapes", "decode returns the shape of the clip")
def _check_lengths(check: _Check) -> None:
    temporal, frames = check.model.temporal, check.shape[1]
    near = range(1, temporal.legal_length(frames) + temporal.multiple + 1)
    legal = [n for n in near if temporal.is_legal(n) and n != frames]
    legal = [n for n in legal if n < frames][-1:] + [n for n in legal if n > frames][:1]
    # An illegal length next to the clip's, and lengths beyond the model's limits.
    beside = [n for n in near if n > frames and not temporal.is_legal(n)][:1]
    beyond = [temporal.minimum - 1, *([temporal.maximum + 1] if temporal.maximum else [])]
    for length in dict.fromkeys([*legal, *beside, *(n for n in beyond if n > 0)]):
        clip = check.other_clip(length, *check.shape[2:])
        try:
            padded = temporal.legal_length(length)
        except UserError:
            _require(
                _refuses(check.model, clip),
                f"a clip of {length} frames is refused with a UserError, as temporal ({temporal}) says; set temporal "
                "to what the model takes",
            )
            continue
        described = f"a clip of {length} frames" + (f" (padded to {padded})" if padded != length else "")
        with _expect_success(f"{described} encodes and decodes, as temporal ({temporal}) says"):
            _round_trip(check.model, clip, described)


@_promise("height and width", "latent shapes", "decode returns the shape of the clip")
def _check_sizes(check: _Check) -> None:
    model, (_, frames, height, width) = check.model, check.shape
    if model.resolution:
        other = check.other_clip(frames, height, width + model.spatial_multiple)
        _require(_refuses(model, other), f"a clip wider than resolution {width} is refused with a UserError")
        return
    step = model.spatial_multiple
    advice = f"spatial_multiple is {step}: set it to what height and width have to be a multiple of"
    advice += ", and a model of squares alone sets resolution"
    described = f"a clip of {height} x {width + step} pixels"
    with _expect_success(f"{described} encodes and decodes; {advice}"):
        _round_trip(model, check.other_clip(frames, height, width + step), described, advice)
    if step > 1:
        other = check.other_clip(frames, height, width + 1)
        _require(_refuses(model, other), f"a width that is not a multiple of {step} is refused with a UserError")


def _refuses(model: VideoAutoencoder, clip: Tensor) -> bool:
    """Return whether `encode` raises a `UserError`."""
    try:
        model.encode(clip)
    except UserError:
        return True
    except Exception:
        return False
    return False


def _round_trip(
    model: VideoAutoencoder, clip: Tensor, described: str, advice: str = "correct _latent_shapes()"
) -> None:
    latents = model.encode(clip).mode()
    decoded = model.decode(latents, clip.shape[2])
    wanted, got = tuple(clip.shape), tuple(decoded.shape)
    _require(got == wanted, f"{described} comes back in its shape: expected {wanted}, got {got}; {advice}")
    claimed = model.latent_shapes(clip.shape[1:])
    shapes = {name: tuple(latent.shape[1:]) for name, latent in latents.items()}
    _require(claimed == shapes, f"latent_shapes() of {described}: claimed {claimed}, got {shapes}; {advice}")


@_promise("invalid inputs are refused", "encode returns the named latents")
def _check_refusals(check: _Check) -> None:
    model, clip = check.model, check.clip
    mistakes: dict[str, Callable[[], object]] = {
        "a clip without a batch axis": lambda: model.encode(clip[0]),
        "a clip of integers": lambda: model.encode(clip.to(torch.uint8)),
        "an unknown latent": lambda: model.decode({**check.latents, "unknown": clip}),
    }
    for wrong, call in mistakes.items():
        promise = f"{wrong} is refused with a UserError; leave encode() and decode() to the base class"
        try:
            with _expect_success(promise):
                call()
        except ContractError as error:
            if isinstance(error.__cause__, UserError):
                continue
            raise
        raise ContractError(promise)


# Saving and training.


@_promise("saving and loading preserve the model", "decode returns the shape of the clip")
def _check_saving(check: _Check) -> None:
    model, name = check.model, type(check.model).__name__
    buffer = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "spec": model.spec()}, buffer)
    buffer.seek(0)
    with _expect_success(f"spec() of {name} holds plain values that can be stored"):
        loaded = torch.load(buffer, weights_only=True)
    with _expect_success(f"{name} can be rebuilt from spec() and state_dict()"):
        rebuilt = type(model)(**loaded["spec"]["init_args"]).to(check.clip).eval()
        rebuilt.load_state_dict(loaded["state_dict"])
    rebuilt_from = "a model rebuilt from spec() and state_dict()"
    advice = "make what it needs a parameter, a buffer or an argument"
    _require(
        check.same(rebuilt.decode(check.latents, check.shape[1]), check.decoded),
        f"{rebuilt_from} decodes the same clip; {advice}",
    )
    for latent, posterior in rebuilt.encode(check.clip).items():
        _require(
            check.same_latent(posterior, check.encoding[latent]),
            f"{rebuilt_from} encodes the same {latent}; {advice}",
        )


_PASSES = 10  # a training step may drop layers or latents at random


@_promise("every trainable parameter gets a gradient", "decode returns the shape of the clip")
def _check_gradients(check: _Check) -> None:
    model = _copy_for_training(check.model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        decoder_trains = model.decode(check.latents, check.shape[1]).requires_grad
    _require(
        not decoder_trains or any(model.last_layer is p for p in parameters.values()),
        "last_layer is one of the trainable parameters; return the module's weight itself (under weight_norm: "
        "module.parametrizations.weight.original1)",
    )
    skipped: list[str] = []
    for _ in range(_PASSES):
        _train(model, check.clip, "", "look for a division by 0, or the log or root of 0")
        dead = [name for name, p in parameters.items() if p.grad is None]
        if not dead:
            _require(
                not skipped or model.may_skip_parameters,
                f"every trainable parameter gets a gradient in each step; these do in some: {skipped[:5]}; set "
                "may_skip_parameters = True, by which several devices look for them",
            )
            return
        skipped = skipped or dead
    raise ContractError(
        f"every trainable parameter gets a gradient; these do not: {dead[:5]}; use them, remove them or freeze them "
        "(requires_grad_(False))"
    )


@_promise("encoders learn from the decoded clip", "every trainable parameter gets a gradient")
@torch.enable_grad()
def _check_learning(check: _Check) -> None:
    model, leaf = _copy_for_training(check.model), check.clip.clone().requires_grad_()
    watched, encoding = model.encode(leaf), model.encode(check.clip)
    for name, sample in watched.sample().items():
        trains = [term for term, value in encoding[name].regularization().items() if value.requires_grad]
        terms = [term for term, value in watched[name].regularization().items() if _has_gradient_path(value, leaf)]
        terms = [term for term in terms if term in trains]  # the others depend on the clip through a frozen encoder
        _require(
            not terms or _has_gradient_path(sample, leaf),
            f"gradients go from {name} back to the clip; its encoder learns from {few(terms)} alone: let sample() "
            "pass them straight through a quantizer, value.detach() + (z - z.detach())",
        )
    latents = {name: z.detach().requires_grad_(z.requires_grad) for name, z in encoding.sample().items()}
    for _ in range(_PASSES):
        decoded = model.decode(latents, check.shape[1])
        if decoded.requires_grad:
            decoded.sum().backward()
        deaf = [name for name, z in latents.items() if z.requires_grad and z.grad is None]
        if not deaf:
            return
    raise ContractError(
        f"gradients go from the decoded clip back to {few(deaf)}; let _decode() use what it is given, not detached"
    )


def _has_gradient_path(output: Tensor, leaf: Tensor) -> bool:
    """Return whether gradients flow from `output` back to `leaf`."""
    leaf.grad = None
    if output.requires_grad:
        output.sum().backward(retain_graph=True)
    return leaf.grad is not None


@_promise("bfloat16", "encode returns the named latents", "decode returns the shape of the clip")
def _check_bfloat16(check: _Check) -> None:
    where = "under torch.autocast in bfloat16"
    with torch.autocast(check.clip.device.type, torch.bfloat16):
        encoding = check.model.encode(check.clip)
        latents = encoding.mode()
        decoded = check.model.decode(latents, check.shape[1])
    for name, latent in latents.items():
        wanted, got = tuple(check.latents[name].shape), tuple(latent.shape)
        _require(got == wanted, f"{name} {where} has its shape {wanted}, got {got}")
        _require(bool(latent.isfinite().all()), f"{name} {where} is finite")
    wanted, got = tuple(check.clip.shape), tuple(decoded.shape)
    _require(got == wanted, f"decode() {where} gives the clip's shape {wanted}, got {got}")
    _require(bool(decoded.isfinite().all()), f"decode() {where} gives finite pixels")


@_promise("training step in bfloat16", "bfloat16", "every trainable parameter gets a gradient")
def _check_bfloat16_step(check: _Check) -> None:
    model = _copy_for_training(check.model)
    with torch.autocast(check.clip.device.type, torch.bfloat16):
        where = " under torch.autocast in bfloat16"
        _train(model, check.clip, where, "compute sums, exponentials and divisions in float32")


def _copy_for_training(model: VideoAutoencoder) -> VideoAutoencoder:
    """Copy a model into training mode without gradients, since training updates batch norms and codebooks."""
    if not any(p.requires_grad for p in model.parameters()):
        raise _NotApplicableError("nothing to train")
    model = copy.deepcopy(model).train()
    model.zero_grad(set_to_none=True)
    return model


@torch.enable_grad()
def _train(model: VideoAutoencoder, clip: Tensor, where: str, advice: str) -> None:
    """Backpropagate the squared error and the posteriors' terms, and require a finite loss and finite gradients."""
    result = model(clip)
    terms = sum(result.regularization.values(), start=torch.zeros((), device=clip.device))
    loss = (result.clip - clip).square().mean() + terms
    loss.backward()
    _require(bool(loss.isfinite()), f"the loss of a training step{where} is finite, got {loss.item()}; {advice}")
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    _require(not bad, f"gradients{where} are finite; those of {few(bad)} are not; {advice}")


@_promise("evaluation changes no weights or buffers")
def _check_unchanged(check: _Check) -> None:
    changed = _find_changed(check)
    _require(
        not changed,
        f"encode() and decode() in evaluation change no weights or buffers; they changed {few(changed)}; move "
        "codebooks and averages under self.training alone",
    )
