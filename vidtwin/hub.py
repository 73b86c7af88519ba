"""Portable weights: a folder of config.json, model.safetensors and README.md, local or on the Hugging Face Hub.

    save_pretrained ──> folder ── push_to_hub ──> owner/name ── from_pretrained ──> model

config.json holds everything needed to use the weights: the class and its arguments, the preprocessing of videos, the
record of the training, and the SHA-256 of the weights, which is verified on loading. It is written last and removed
first, so a folder that has it is complete. Loading runs no code from the files.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vidtwin import cards, plugins, weights
from vidtwin.errors import UserError
from vidtwin.files import inside, parse_json, replacing, write_text

if TYPE_CHECKING:
    from vidtwin.autoencoder import VideoAutoencoder

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT_VERSION = 1
HUB_PREFIX = "hf://"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_ADDRESS = re.compile(r"hf:/{1,2}([^@]+)(?:@(.+))?")  # pathlib.Path collapses the two slashes to one
_PICTURE = re.compile(r"!\[[^\]]*\]\(([\w-]+\.(?:png|svg|jpg|webp))\)")  # beside the card
_CARD = """\
---
{{ card_data }}
---

# {{ title }}
{% if description %}
{{ description }}
{% endif %}
A video autoencoder of `vidtwin` ({{ class_path }}): {{ parameters }} parameters. It takes {{ frames }}\
{% if resolution %} of {{ resolution }} x {{ resolution }} pixels{% endif %}, RGB in [-1, 1], as
(batch, 3, frames, height, width), and encodes to the latents {{ latents }}{% if rate %}: {{ rate }} of the clip's \
numbers{% endif %}.

```python
from vidtwin import VideoAutoencoder

{% if checkpoint %}# After vidtwin convert {{ checkpoint }} {{ address }}
{% endif %}model = VideoAutoencoder.from_pretrained({{ address }})  # in evaluation mode
latents = model.encode(clip).mode()
clip = model.decode(latents)
```

{{ command }} does the same for files. `config.json` holds the arguments, the
`preprocessing` of videos, a record of the `training`, and the SHA-256 of the weights.
{% for section in sections %}

{{ section }}
{% endfor %}
"""


class Pretrained(
    PyTorchModelHubMixin, library_name="vidtwin", tags=["video", "video-autoencoder"], model_card_template=_CARD
):
    """huggingface_hub's mixin in the format above: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    Attributes:
        training_record: Plain values that describe the training. `save_pretrained` stores them under `training`,
            `from_pretrained` restores them, and `vidtwin convert` takes them from a checkpoint.
    """

    training_record: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        model = super().__new__(cls)
        # The arguments that the mixin records lack those of **kwargs; config.json stores `init_args` instead.
        object.__setattr__(model, "_hub_mixin_config", None)
        object.__setattr__(model, "training_record", {})
        return model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        card: str | Path | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write config.json, model.safetensors and, if missing, README.md.

        Args:
            save_directory: Target folder.
            config: Must be None, since config.json describes the model itself; set `training_record` to add to it.
            repo_id: Target of `push_to_hub`; by default the folder's name.
            push_to_hub: Upload the folder too.
            model_card_kwargs: Values of the generated card, see `generate_model_card`.
            card: A README.md of `vidtwin card` to take instead, with the pictures that it shows; it replaces an
                existing one.
            push_to_hub_kwargs: Further arguments of `push_to_hub`.

        Returns:
            The URL of the commit with `push_to_hub`, else None.

        Raises:
            UserError: `config` is given, or the folder can't be written, or the card can't be read.
        """
        if config is not None:
            raise UserError("Expected no config: config.json is the model's own; set its training_record instead.")
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"Expected a folder to save in, got the file {folder}.")
        values = {"address": folder.name, "ckpt_path": folder.name} | (model_card_kwargs or {})
        card = values.pop("card", card)
        files = _read_card(card) if card is not None else {}
        try:
            super().save_pretrained(folder, model_card_kwargs=values)
            for name, content in files.items():
                with replacing(folder / name) as temporary:
                    temporary.write_bytes(content)
        except (OSError, SafetensorError) as error:  # no room, no permission
            raise UserError(f"Expected to write {folder}, got: {error}.") from error
        if not push_to_hub:
            return None
        repo_id = repo_id or folder.name
        return self.push_to_hub(repo_id, model_card_kwargs=model_card_kwargs, card=card, **push_to_hub_kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        model_card_kwargs: dict[str, Any] | None = None,
        card: str | Path | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str:
        """Upload the model to owner/name on the Hub → the URL of the commit.

        Args:
            repo_id: owner/name; created if missing.
            model_card_kwargs: As for `save_pretrained`.
            card: As for `save_pretrained`.
            push_to_hub_kwargs: `private`, `branch`, `commit_message`, `create_pr`, `token` and others of the mixin.
        """
        values = (model_card_kwargs or {}) | {"address": repo_id, "ckpt_path": f"{HUB_PREFIX}{repo_id}"}
        # The mixin saves into a folder of its own by `save_pretrained`, to which it hands these values alone.
        if card is not None:
            values["card"] = card
        return str(super().push_to_hub(repo_id, model_card_kwargs=values, **push_to_hub_kwargs))

    def _save_pretrained(self, save_directory: Path) -> None:
        model = cast("VideoAutoencoder", self)
        state = _collect_state(model)
        text = json.dumps(describe(model, weights.sha256(state)), indent=2, default=_to_plain) + "\n"
        with replacing(save_directory / WEIGHTS) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        write_text(save_directory / CONFIG, text)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str = "cpu",
        trust_modules: Sequence[str] = (),
        **model_kwargs: Any,
    ) -> Self:
        """Load a model of this class in evaluation mode; `VideoAutoencoder.from_pretrained` accepts every class.

        Args:
            pretrained_model_name_or_path: A folder of `save_pretrained`, or an id on the Hub (owner/name).
            force_download: Download again even if cached.
            token: Access token for a private model; by default that of `hf auth login`.
            cache_dir: Folder of downloads.
            local_files_only: Use the cache alone, without the network.
            revision: Branch, tag or commit on the Hub.
            map_location: Device of the model.
            trust_modules: Modules whose classes the weights may be of, beside vidtwin's, those of installed plug-ins
                and those that are imported already.
            model_kwargs: Arguments of the class that override the saved ones, such as `activation_checkpointing=True`.

        Raises:
            UserError: The model can't be found or downloaded, is of another class, or is damaged.
        """
        name = str(pretrained_model_name_or_path)
        folder = fetch(
            name,
            revision,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        with plugins.trusting(trust_modules):
            model = _load(cast("type[VideoAutoencoder]", cls), folder, name, model_kwargs)
        return cast(Self, model.to(map_location))

    def generate_model_card(
        self,
        *args: Any,
        address: str = "owner/name",
        ckpt_path: str = f"{HUB_PREFIX}owner/name",
        description: str = "",
        sections: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> ModelCard:
        """Return the README, which describes the model, how to load it, and its training.

        Args:
            args: Of the mixin.
            address: Argument of `from_pretrained` in the example.
            ckpt_path: Weights in the example of a command.
            description: Free text, in Markdown.
            sections: Further sections in Markdown, by default that of the `training_record`.
            metadata: Values of the card's header, such as `license`, over those of the library.
            kwargs: Further values of the template, such as the `checkpoint` that a folder `address` is made of.
        """
        model = cast("VideoAutoencoder", self)
        length, side = model.temporal.usual_length, model.resolution
        record = "\n".join(cards.training_section(model.training_record))
        values: dict[str, Any] = {
            "title": cards.escape(model.class_path.rpartition(".")[2]),
            "class_path": cards.code(model.class_path),
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "frames": model.temporal,
            "resolution": side,
            "latents": " and ".join(cards.code(name) for name in model.latent_names),
            "rate": f"{model.compression_rate((3, length, side, side)):.4%}" if side else None,
            "address": cards.quote(address),
            "command": cards.code(f"vidtwin reconstruct VIDEO --ckpt_path {ckpt_path}"),
            "description": description,
            "sections": [record] * bool(record) if sections is None else list(sections),
        }
        info = self._hub_mixin_info
        header = ModelCardData(**info.model_card_data.to_dict() | dict(metadata or {}))
        return ModelCard.from_template(header, template_str=info.model_card_template, **values | kwargs)


def describe(model: "VideoAutoencoder", sha256: str) -> dict[str, Any]:
    """Return the content of config.json for a model and the SHA-256 of its weights (`weights.sha256`)."""
    from vidtwin import __version__
    from vidtwin.video import COLOURS, RESIZE_FILTERS, Resize  # needs PyAV

    data = model.training_record.get("data")
    settings = data if isinstance(data, dict) else {}
    resize: Resize = "bilinear" if settings.get("resize") == "bilinear" else "area"
    return {
        "format_version": FORMAT_VERSION,
        "vidtwin_version": __version__,
        **model.spec(),
        "latents": list(model.latent_names),
        "preprocessing": {
            "layout": "(batch, 3, frames, height, width)",
            "channels": "RGB",
            "value_range": [-1.0, 1.0],
            "num_frames": model.temporal.usual_length,
            "legal_lengths": asdict(model.temporal),
            "resolution": model.resolution,
            "spatial_multiple": model.spatial_multiple,
            "resize": RESIZE_FILTERS[resize],
            "crop": f"the largest square in the middle, {'after' if resize == 'bilinear' else 'before'} the resizing",
            "colour": COLOURS[resize],
            "fps": settings.get("fps"),
        },
        "training": model.training_record,
        "weights_sha256": sha256,
    }


def _read_card(path: str | Path) -> dict[str, bytes]:
    """Read a README.md and the pictures beside it that it shows → content by name."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"Expected a card at {path}, got no such file; `vidtwin card` writes one.")
    files = {CARD: path.read_bytes()}
    try:
        text = files[CARD].decode()
    except UnicodeDecodeError as error:
        raise UserError(f"Expected a card in UTF-8 at {path}, got another file ({error}).") from error
    for name in _PICTURE.findall(text):
        picture = inside(path.parent, name)
        if not picture.is_file():
            raise UserError(f"Expected the picture {name} of {path} beside it, got no such file.")
        files[name] = picture.read_bytes()
    return files


def is_pretrained(path: str | Path) -> bool:
    """Return whether a path is a folder or an address on the Hub (hf://owner/name) rather than a file of weights."""
    return _HUB_ADDRESS.fullmatch(str(path)) is not None or Path(path).is_dir()


def join_path(folder: str | Path, path: str) -> str:
    """Join a path to `folder`; return an address on the Hub unchanged."""
    return path if _HUB_ADDRESS.fullmatch(path) else str(Path(folder) / path)


def fetch(name: str | Path, revision: str | None = None, **options: Any) -> Path:
    """Return the local folder of weights, after a download if `name` is an id on the Hub.

    Args:
        name: A folder, or an id on the Hub (owner/name or hf://owner/name).
        revision: Branch, tag or commit; also accepted as `hf://owner/name@revision`.
        options: Arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        UserError: The name is invalid, or the download failed.
    """
    text = str(name)
    address = _HUB_ADDRESS.fullmatch(text)
    if not address and Path(text).is_dir():
        if revision is not None:
            raise UserError(f"Expected no revision of the folder {text}, got {revision!r}; only the Hub has revisions.")
        return Path(text)
    repo, inner = (address[1], address[2]) if address else (text, None)
    if revision and inner and revision != inner:
        raise UserError(f"Expected one revision of {repo}, got {inner!r} and {revision!r}.")
    revision = revision or inner
    if Path(text).is_file():
        raise UserError(f"Expected a folder of weights, got the file {text}; `vidtwin convert {text} OUT` makes one.")
    if not _HUB_NAME.fullmatch(repo):
        raise UserError(f"Expected a folder of weights or an id of the Hub (owner/name), got {text}.")
    try:
        config = Path(hf_hub_download(repo, CONFIG, revision=revision, **options))
        # From the commit of config.json, so that a push between the two downloads can't mix them.
        hf_hub_download(repo, WEIGHTS, revision=config.parent.name, **options)
    except Exception as error:  # errors of network, server and file system share no base class
        missing = isinstance(error, LocalEntryNotFoundError)
        cause = error.__cause__ if missing and error.__cause__ else error  # such as a missing network
        reason = " ".join(str(cause).split()).partition(". ")[0].rstrip(".") or type(cause).__name__
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"Expected a folder or an id of the Hugging Face Hub, got {repo}{at}"
            f"{', which is not in its cache' if missing else ''}: {reason}."
        ) from error
    return config.parent


def read_config(folder: Path, name: str | Path) -> dict[str, Any]:
    """Read and check config.json of a folder; `name` is the user's name for it in messages.

    Raises:
        UserError: It is missing, damaged, or of another version.
    """
    path = folder / CONFIG
    if not path.is_file():
        there = sorted(each.name for each in folder.iterdir())[:5]
        has = f"it holds {', '.join(there)}" if there else "it is empty"
        raise UserError(f"Expected a folder of save_pretrained, got {name} without {CONFIG}: {has}.")
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"Expected JSON in {path}, got: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("class_path"), str):
        raise UserError(
            f"Expected {path} as save_pretrained writes it, got one without class_path; `vidtwin convert` turns "
            "released weights into that form."
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"Expected format_version {FORMAT_VERSION} in {path}, got {config.get('format_version')}; it is of another "
            "version of vidtwin."
        )
    if not isinstance(config.get("init_args"), dict) or not isinstance(config.get("weights_sha256"), str):
        raise UserError(f"Expected init_args and weights_sha256 in {path}, got a config without.")
    if not isinstance(config.get("training", {}), dict):
        raise UserError(f"Expected training in {path} to be an object, got {config['training']!r}.")
    return config


def read_state(folder: Path, config: Mapping[str, Any], check: bool = True) -> dict[str, Tensor]:
    """Read the tensors of a folder by name; with `check` verify their SHA-256 against config.json."""
    state: dict[str, Tensor] = weights.read(folder / WEIGHTS)
    if check and (found := weights.sha256(state)) != config["weights_sha256"]:
        raise UserError(
            f"Expected weights of SHA-256 {config['weights_sha256'][:12]}… in {folder / WEIGHTS}, as {CONFIG} says, "
            f"got {found[:12]}…: one of the two was changed or is damaged."
        )
    return state


def _load(cls: "type[VideoAutoencoder]", folder: Path, name: str, changed: Mapping[str, Any]) -> "VideoAutoencoder":
    config = read_config(folder, name)
    plugins.check_trusted({key: config[key] for key in ("class_path", "init_args")}, name)
    plugins.class_of(config["class_path"], cls)
    model = plugins.build({"class_path": config["class_path"], "init_args": config["init_args"] | dict(changed)}, cls)
    state = read_state(folder, config)
    weights.check_fit(state, model.state_dict(), str(folder / WEIGHTS))
    model.load_state_dict(state)
    object.__setattr__(model, "training_record", config.get("training") or {})
    return model.eval()


def _collect_state(model: "VideoAutoencoder") -> dict[str, Tensor]:
    """Return the state dict on the CPU, no two tensors sharing memory, as safetensors requires."""
    state: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in model.state_dict().items():
        if hasattr(value, "full_tensor"):
            raise UserError(
                "Expected a whole model, got one sharded over processes; `vidtwin convert` takes its checkpoint."
            )
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != value.nbytes:  # tied weights, or a view
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        state[name] = value
    return state


def _to_plain(value: object) -> Any:
    """Convert a value that JSON does not know, or raise `UserError`."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise UserError(
        f"Expected arguments that JSON can hold, got {value!r}; let the model take numbers, strings, lists and "
        "dictionaries."
    )
