"""Command line of `vidtwin test`: a sweep over a list of autoencoders, or over one. Imports torch and lightning."""

import argparse
import inspect
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace
from lightning import LightningDataModule

from vidtwin import console
from vidtwin.benchmark.options import Entry, ModelConfig, SweepOptions
from vidtwin.benchmark.sweep import Sweep
from vidtwin.cli import model_config, paths
from vidtwin.cli.options import CONFIG, DESCRIPTION, INTERNAL, NAMES, OF_ONE, USAGE
from vidtwin.cli.parser import (
    Parser,
    config_paths,
    name_data_first,
    option_value,
    read_config,
    resolve_short_names,
    user_errors,
)
from vidtwin.errors import UserError, suggestion
from vidtwin.storage import checkpoints

_PICTURES = 2
_RENAMED = {  # options of `fit` that have another name here
    "--trainer.accelerator": "--accelerator",
    "--trainer.devices": "--devices",
    "--trainer.num_nodes": "--num_nodes",
    "--trainer.precision": "--precision",
    "--trainer.enable_progress_bar": "--progress",
    "--model.use_ema": "--protocol.weights",
    "--model.loss.perceptual_backbone": "--perceptual_backbones.vgg",
    "--model.loss.init_args.perceptual_backbone": "--perceptual_backbones.vgg",
}

_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's short names
_WEIGHTS = {"true": "average", "false": "last"}


def run(argv: list[str]) -> int:
    """Run `vidtwin test ARGV` → exit code."""
    several = _is_sweep(argv)
    argv = _complete_flag(name_data_first(resolve_short_names(argv)))
    in_configs = bool((read_config(config_paths(argv)).get("model") or {}).get("autoencoder"))
    chosen = in_configs or any(word.startswith(f"--{model_config.KEY}") for word in argv)
    spec = None if several or in_configs else _read_model_of_checkpoint(argv)
    if not several:
        argv = [*([f"--model.autoencoder={json.dumps(spec)}"] if spec else []), *_rename(argv)]
    parser = _make_sweep_parser() if several else _make_model_parser(config_paths(argv))
    config = parser.parse_args(argv)
    kept = paths.texts(spec) | paths.values(argv)
    for key in ("autoencoders", model_config.KEY, *_list_options()):  # other keys of `fit` count for nothing here
        if config.get(key) is not None:
            config[key] = paths.expand(config[key], kept)
    return (_make_sweep(parser, config, argv) if several else _make_single_sweep(parser, config, chosen)).run()


def _make_sweep(parser: Parser, config: Namespace, argv: list[str]) -> Sweep:
    folders = [path.resolve().parent for path in config_paths(argv)]
    with user_errors(config):
        arguments = parser.instantiate(config).as_dict()
        arguments.pop("config", None)
        return Sweep(**arguments, read_config=partial(read_model, folders=folders))


def _make_single_sweep(parser: Parser, config: Namespace, chosen: bool) -> Sweep:
    """Make the sweep of one entry. `chosen`: whether options or configs name the model, not the checkpoint alone."""
    if config.get("data") is None:
        raise UserError("Expected data to test on; give --data ucf101 --data.root PATH or a --config.")
    parsed = (config.get("model") or Namespace()).get("autoencoder")
    if not (parsed and parsed.get("class_path")):
        raise UserError("Expected an autoencoder to test, got none; give --ckpt_path FILE.")
    model = Namespace(model=Namespace(autoencoder=parsed))
    given = ModelConfig(model_config.spec(model), lambda: model_config.build(parser, model))
    name = config.name or given.spec["class_path"].rpartition(".")[2]
    entry = Entry(name, ["the command line"] if chosen else None, config.ckpt_path)
    own = Namespace({key: config[key] for key in _list_options()})
    with user_errors(own):
        arguments = parser.instantiate(own).as_dict()
        return Sweep([entry], **arguments, read_config=lambda *_: given, pictures=_PICTURES, strict=True)


def _make_sweep_parser() -> Parser:
    parser = _make_parser()
    parser.add_argument("-c", "--config", action=ActionConfigFile, help=CONFIG)
    parser.add_class_arguments(SweepOptions, fail_untyped=False, sub_configs=True, skip=INTERNAL)
    return parser


def _make_model_parser(configs: Sequence[Path]) -> Parser:
    parser = _make_parser()
    parser.add_class_arguments(
        SweepOptions, fail_untyped=False, sub_configs=True, skip={"autoencoders", "data", *INTERNAL}
    )
    parser.add_subclass_arguments(LightningDataModule, "data", as_group=False, fail_untyped=False, required=False)
    for option in ("ckpt_path", "name"):
        parser.add_argument(f"--{option}", type=str, help=OF_ONE[option])
    own = [*_list_options(), "ckpt_path", "name"]
    for key in read_config(configs):
        if key not in (known := {*own, *NAMES["fit"]}):
            raise UserError(f"Expected keys of `fit` or `test` in a config, got {key!r}{suggestion(key, known)}")
    model_config.add_arguments(parser, configs, own, CONFIG)
    (action,) = (action for action in parser._actions if action.dest == model_config.KEY)
    action.help = OF_ONE[model_config.KEY]  # hidden in other commands, and then missing from --print_config
    return parser


def _make_parser() -> Parser:
    return Parser(
        prog="vidtwin test",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _list_options() -> list[str]:
    return [name for name in inspect.signature(SweepOptions).parameters if name not in {"autoencoders", *INTERNAL}]


def read_model(
    configs: Sequence[str], arguments: Mapping[str, Any] | None = None, folders: Sequence[Path] = ()
) -> ModelConfig:
    """Read the model of configs that lie in one of `folders` or below the current one, with arguments over theirs."""
    found = [next((f / path for f in folders if (f / path).is_file()), Path(path)) for path in configs]
    parser, parsed = model_config.parse(found, arguments=arguments)
    return ModelConfig(model_config.spec(parsed), lambda: model_config.build(parser, parsed))


def _read_model_of_checkpoint(argv: list[str]) -> dict[str, Any] | None:
    """Return class path and arguments of the checkpoint's model if no option names one; options may change them."""
    checkpoint = option_value(argv, "ckpt_path")
    if not checkpoint or option_value(argv, "model.autoencoder"):
        return None
    return checkpoints.model_spec(checkpoints.read(checkpoint, lazily=True), checkpoint)


def _rename(argv: list[str]) -> list[str]:
    """Rename options of `fit` that measuring has too; `UserError` names those that serve instead of the others."""
    renamed = _read_options(argv)
    for before, word in zip(["", *argv], argv, strict=False):
        option, equals, value = word.partition("=")
        if before == "--model.use_ema":
            word = _WEIGHTS.get(word.lower(), word)
        if option in _RENAMED:
            value = _WEIGHTS.get(value.lower(), value) if option == "--model.use_ema" else value
            word = f"{_RENAMED[option]}{equals}{value}"
        elif option.startswith("--trainer."):
            raise UserError(
                f"Expected options of `vidtwin test`, got {option}; there are --accelerator, --devices, --num_nodes, "
                "--precision and --progress."
            )
        elif option.startswith("--model.") and not option.startswith(f"--{model_config.KEY}"):
            raise UserError(
                f"Expected options of the autoencoder (--model.autoencoder...), got {option}; --perceptual_backbones "
                "names the files of LPIPS, --protocol.weights average takes averaged weights."
            )
        renamed.append(word)
    return renamed


def _read_options(argv: list[str]) -> list[str]:
    """Return options that configs of `fit` set under other names: accelerator, precision, existing VGG-16 file."""
    options = []
    for content in (read_config([path]) for path in config_paths(argv)):
        trainer, loss = content.get("trainer"), (content.get("model") or {}).get("loss")
        for name in ("accelerator", "precision"):
            value = trainer.get(name) if isinstance(trainer, dict) else None
            if isinstance(value, int | str) and not option_value(argv, name, f"trainer.{name}"):
                options.append(f"--{name}={_PRECISIONS.get(str(value), value)}")
        path = (loss.get("init_args") or {}).get("perceptual_backbone") if isinstance(loss, dict) else None
        if path and Path(path := paths.expand_text(path)).is_file():
            options.append(f"--perceptual_backbones.vgg={path}")
        limit = trainer.get("limit_test_batches") if isinstance(trainer, dict) else None
        if limit is not None and not (isinstance(limit, float) and limit == 1):  # 1.0 is all, 1 is one
            console.log(
                f"trainer.limit_test_batches {limit} does not hold here: every test clip is "
                "measured; a shorter list of test videos, as --data folder --data.csv FILE has it, measures fewer"
            )
    return options


def _complete_flag(argv: list[str]) -> list[str]:
    """Let a bare `--meta` mean `--meta=true`."""
    following = [*argv[1:], ""]
    return [
        f"{word}=true" if word == "--meta" and after.lower() not in ("true", "false") else word
        for word, after in zip(argv, following, strict=True)
    ]


def _is_sweep(argv: list[str]) -> bool:
    """Return whether the arguments, or one of their configs, have a list of autoencoders."""
    if any(word.partition("=")[0].rstrip("+") == "--autoencoders" for word in argv):
        return True
    return "autoencoders" in read_config(config_paths(argv))
