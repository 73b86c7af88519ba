"""Under which protocol a row of results was measured, and its hash."""

import hashlib
import json
from pathlib import Path
from typing import Any

from vidtwin.errors import UserError
from vidtwin.files import write_text

# What the metrics compute; the frames, the size and the clips come from the data module.
VIDTWIN: dict[str, Any] = {
    "name": "vidtwin",
    "value_range": [0.0, 1.0],
    "rounding": "none",
    "aggregation": "mean over frames, then over clips",
    "psnr": "-10 log10(MSE + 1e-8) per frame",
    "ssim": "Gaussian window 11x11, sigma 1.5, valid positions, mean over RGB",
    "lpips": "vgg, version 0.1, per frame",
    "posterior": "mode",
}


def protocol_hash(protocol: dict[str, Any]) -> str:
    """First 16 digits of the SHA-256 of the protocol as canonical JSON."""
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flat(protocol: dict[str, Any]) -> dict[str, Any]:
    """Nested keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in protocol.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": deeper for inner, deeper in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def write(protocol: dict[str, Any], folder: Path) -> str:
    """Write `protocol.json` into a results folder → its hash. Rows of another protocol there are a `UserError`."""
    path = folder / "protocol.json"
    digest = protocol_hash(protocol)
    if path.exists():
        found = json.loads(path.read_text())
        if protocol_hash(found) != digest:
            ours, theirs = _flat(protocol), _flat(found)
            differing = [
                f"{key} {ours.get(key)} for {theirs.get(key)}"
                for key in sorted({*ours, *theirs})
                if ours.get(key) != theirs.get(key)
            ]
            raise UserError(
                f"Expected results of protocol {digest} in {folder}, got those of {protocol_hash(found)} "
                f"(they differ in {', '.join(differing)}); choose another --results_dir."
            )
        return digest
    write_text(path, json.dumps(protocol, indent=2, sort_keys=True) + "\n")
    return digest
