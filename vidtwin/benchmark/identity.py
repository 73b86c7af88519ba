"""The identity of a row's numbers, and how earlier versions, whose models had fewer arguments, have spelled it."""

import json
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from vidtwin import plugins
from vidtwin.autoencoder import VideoAutoencoder, complete
from vidtwin.benchmark.plan import compute_digest
from vidtwin.errors import UserError

MAX_ADDED = 3
"""So many arguments may have been added to a model since parts were measured, which do not say what it had."""


OF_LATENTS = ("compile", "rate_distortion", "seed")
"""Settings that change no number of a codec, which has no blocks to compile, and whose bytes are those of its clip."""


def is_codec(spec: dict[str, Any] | None) -> bool:
    """Return whether the class of a spec is a codec, without building it."""
    if not spec:
        return False
    try:
        return bool(plugins.class_of(spec["class_path"], VideoAutoencoder).codes_bytes)
    except UserError:  # which building it will raise too
        return False


def select_settings(model: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a row's numbers, without those that leave the numbers of its model alone."""
    codec = is_codec(model.get("model"))
    return {key: value for key, value in settings.items() if not (codec and key in OF_LATENTS)}


def compute_identity(model: dict[str, Any], settings: dict[str, Any]) -> str:
    """Compute the identity of a row.

    Args:
        model: `Job.identity`.
        settings: Settings beside the model that decide the row's numbers.
    """
    return compute_digest([compute_digest(model), settings])


def find_known(
    model: dict[str, Any], settings: dict[str, Any], found: Iterable[tuple[str, dict[str, Any] | None]]
) -> str | None:
    """Return the first of the identities in a row's folder under which the same model was measured.

    An argument that has its default may be missing in an identity: the model had no such argument then.

    Args:
        model: `Job.identity`.
        settings: As in `compute_identity`.
        found: Identities, each with the spec of the model that was measured if it is known.
    """
    own = compute_identity(model, settings)
    shorter: set[str] | None = None
    for identity, measured in found:
        if identity == own:
            return identity
        if shorter is None:
            shorter = {compute_identity(other, settings) for other in _shorten(model)}
        if identity in shorter or identity in {compute_identity(x, settings) for x in _cut_to(model, measured)}:
            return identity
    return None


def _shorten(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the identity with all arguments, and without any few of those that have their defaults."""
    arguments, defaults = _read_arguments(model)
    unchanged = [name for name, value in arguments.items() if name in defaults and defaults[name] == value]
    for count in range(MAX_ADDED + 1 if arguments else 0):
        for names in combinations(unchanged, count):
            yield _with_arguments(model, {key: value for key, value in arguments.items() if key not in names})


def _cut_to(model: dict[str, Any], measured: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the identity with the arguments of the measured model, if all others have their defaults."""
    arguments, defaults = _read_arguments(model)
    held = (measured or {}).get("init_args")
    if not (arguments and isinstance(held, dict)):
        return
    others = [name for name in arguments if name not in held]
    if all(name in defaults and defaults[name] == arguments[name] for name in others):
        yield _with_arguments(model, {key: value for key, value in arguments.items() if key in held})


def _read_arguments(model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all arguments of a model and the defaults of its class, as JSON has them; none if there is no class."""
    spec = model.get("model")
    try:
        found = (complete(spec), complete({"class_path": spec["class_path"]})) if spec else ({}, {})
    except UserError:  # which building it will raise too
        return {}, {}
    first, second = json.loads(json.dumps(found, default=str))
    return first, second


def _with_arguments(model: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    return model | {"model": model["model"] | {"init_args": arguments}}
