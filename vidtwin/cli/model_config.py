"""Read and build the autoencoder of `fit` configs, ignoring their other keys.

Imported only when a command needs it, since it imports torch.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ActionConfigFile, Namespace

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.cli import bases, paths
from vidtwin.cli.parser import Parser, read_config
from vidtwin.errors import UserError, causes

KEY = "model.autoencoder"


def add_arguments(parser: Parser, configs: Iterable[str | Path], own: Iterable[str] = (), shown: str = "") -> None:
    """Give a parser `--config` and `--model.autoencoder`, and let it ignore the other keys of the configs.

    Args:
        parser: Of the command.
        configs: Files that will be parsed.
        own: Options of the command that a config may set.
        shown: Help of --config.
    """
    parser.add_argument("-c", "--config", action=ActionConfigFile, help=shown or argparse.SUPPRESS)
    parser.add_subclass_arguments(VideoAutoencoder, KEY, as_group=False, required=False, help=argparse.SUPPRESS)
    content = read_config(configs)
    model = content.get("model")
    ignored = {key for key in content if key != "model"}
    ignored |= {f"model.{key}" for key in (model if isinstance(model, dict) else {})}
    for key in sorted(ignored - {KEY, "config", *own}):
        parser.add_argument(f"--{key}", type=Any, help=argparse.SUPPRESS)


def parse(
    configs: Sequence[str | Path], foreign: bool = False, arguments: Mapping[str, Any] | None = None
) -> tuple[Parser, Namespace]:
    """Parse configs, each over those before it, and arguments of the autoencoder over theirs.

    Paths in `foreign` ones, which others wrote, are not expanded. Raises `UserError` if none names an autoencoder.
    """
    configs = bases.expand_paths(configs, foreign)
    parser = Parser(prog="vidtwin")
    add_arguments(parser, configs)
    words = [f"--config={path}" for path in configs]
    if arguments:
        words.append(f"--config={json.dumps({'model': {'autoencoder': {'init_args': dict(arguments)}}})}")
    parsed = parser.parse_args(words)
    given = (parsed.get("model") or {}).get("autoencoder")
    if not (given and given.get("class_path")):
        raise UserError(f"Expected model.autoencoder in {', '.join(map(str, configs))}, got none.")
    if not foreign:
        paths.expand(given)
    return parser, parsed


def read(config: str, foreign: bool = False) -> tuple[dict[str, Any], Callable[[], VideoAutoencoder]]:
    """Read the autoencoder of a config (`foreign`: that others wrote): its `spec` and a function that builds it."""
    parser, parsed = parse([config], foreign)
    return spec(parsed), lambda: build(parser, parsed)


def spec(parsed: Namespace) -> dict[str, Any]:
    """Return `class_path` and `init_args` as the config has them; those in `dict_kwargs` are arguments too."""
    given = parsed.model.autoencoder
    arguments = (given.get("init_args") or Namespace()).as_dict()
    return {"class_path": given.class_path, "init_args": arguments | dict(given.get("dict_kwargs") or {})}


def build(parser: Parser, parsed: Namespace) -> VideoAutoencoder:
    """Build the autoencoder of a parsed config, with the same random weights each time. Raises `UserError`."""
    from vidtwin.testing import describe

    path = parsed.model.autoencoder.class_path
    alone = Namespace(model=Namespace(autoencoder=parsed.model.autoencoder))  # no loss, no data
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model: VideoAutoencoder = parser.instantiate(alone).model.autoencoder
    except Exception as error:
        chain = list(causes(error))
        for cause in chain:  # jsonargparse wraps it
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
        raise UserError(f"{path} can't be built: {describe(chain[-1])}.") from error
    return model
