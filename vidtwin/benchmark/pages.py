"""Pages of one file: a template with its style, script, data and pictures, which asks the network for nothing.

A page's content security policy allows the style and the script of its digests alone.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

import jinja2

from vidtwin.errors import UserError
from vidtwin.files import inside


@dataclass(frozen=True)
class Assets:
    """The parts of a page, as text."""

    template: str
    style: str
    script: str

    @classmethod
    def load(cls, package: str, folder: str, name: str) -> Self:
        """Read `template.html`, `<name>.css` and `<name>.js` in a folder of a package."""
        files = ("template.html", f"{name}.css", f"{name}.js")
        return cls(*((resources.files(package) / folder / file).read_text(encoding="utf-8") for file in files))

    def render(self, **values: Any) -> str:
        """Render the page: `values` are those of its template beside the style, the script and their digests."""
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        return environment.from_string(self.template).render(
            **values,
            style=self.style,
            script=self.script,
            style_hash=hash_for_policy(self.style),
            script_hash=hash_for_policy(self.script),
        )


def as_json(data: dict[str, Any]) -> str:
    """Write JSON that ends no script element and opens none, whatever the names hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def hash_for_policy(text: str) -> str:
    """Name a style or a script as a content security policy does."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def read_strip(folder: Path, file: str) -> str:
    """Read a WebP picture of a results folder as base64.

    Raises:
        UserError: It is missing, or another file.
    """
    path = inside(folder, file)
    content = path.read_bytes() if path.is_file() else b""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        raise UserError(
            f"Expected a WebP picture in {path}, got {'another file' if content else 'none'}; remove {path.parents[1]} "
            "and run the sweep again, or remove the folder players."
        )
    return base64.b64encode(content).decode()
