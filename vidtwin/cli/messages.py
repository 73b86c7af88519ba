"""Turn jsonargparse's errors into one line each, with a suggestion. Import nothing heavy.

Its exceptions have no attributes, but their causes do: the module that lacks a class, the module that is absent, the
error of an inner parser. Text is parsed only if nothing else carries the information; a wording of another version
passes through in one line.
"""

import argparse
import inspect
import pkgutil
import re
import sys
from types import ModuleType

from vidtwin import plugins
from vidtwin.errors import UserError, causes, suggestion

SHORT_NAMES = {"data": "vidtwin.datamodules", "model.autoencoder": "vidtwin.autoencoders"}
# Classes that a config may name derive from these; those that are not imported yet have no names to suggest.
_ROOTS = (
    ("vidtwin.autoencoder", "VideoAutoencoder"),
    ("lightning.pytorch", "LightningDataModule"),
    ("vidtwin.losses.autoencoder", "AutoencoderLoss"),
    ("torch.optim", "Optimizer"),
    ("torch.optim.lr_scheduler", "LRScheduler"),
    ("lightning.pytorch", "Callback"),
    ("lightning.pytorch.loggers", "Logger"),
)
_REQUIRED = "the following arguments are required: "  # argparse's wording, as is the next
_UNRECOGNIZED = "unrecognized arguments: "


class ParserExit(SystemExit):
    """The exit of a parser that has printed its answer: --help, --print_config."""


class OptionError(UserError):
    """A mistake in an option; the parser of a class raises it to the parser of the command.

    Attributes:
        key: The option, "" if it is not known.
        reason: The message without the option.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}" if key else reason)
        self.key = key
        self.reason = reason


def shorten(message: str, parser: argparse.ArgumentParser, error: Exception | None) -> OptionError:
    """Make one line of a parser's message: the innermost reason, with a suggestion."""
    text = " ".join(message.split()).rstrip(".")
    key = ""
    if match := re.match(r'Parser key "([\w.]+)": ', text):
        key, text = match[1], text[match.end() :]
    for cause in causes(error, contexts=True):
        if isinstance(cause, OptionError):
            return OptionError(".".join(filter(None, (key, cause.key))), cause.reason)
        if reason := _reason(cause):
            return OptionError(key, reason)
    if text.startswith(_REQUIRED):
        return OptionError(key, _require(text.removeprefix(_REQUIRED).split(", "), parser))
    if text.startswith(_UNRECOGNIZED):
        text = text.removeprefix(_UNRECOGNIZED)
        near = suggestion(re.split(r"[ =]", text)[0].lstrip("-"), _options(parser) if text.startswith("-") else [])
        return OptionError(key, f"Expected options that exist, got {text}{near}")
    if isinstance(error, KeyError) and (quoted := re.findall(r"'([\w.]+)'", text)):
        names = [name.rpartition(".")[2] for name in _options(parser)]
        return OptionError(key, text + suggestion(quoted[-1].rpartition(".")[2], names))
    text = _innermost(text)
    if match := re.fullmatch(r"Expected a dot import path string: (\S+)", text):
        classes = [cls.__name__ for cls in _classes()]
        if known := sorted(plugins.available(SHORT_NAMES[key])) if key in SHORT_NAMES else []:
            choices = f"{suggestion(match[1], [*known, *classes])} Known: {', '.join(known)}."
            return OptionError(key, f"Expected a short name or a class path, got {match[1]!r}{choices}")
        return OptionError(key, f"Expected a class path, got {match[1]!r}{suggestion(match[1], classes)}")
    if match := re.fullmatch(r"Expected an? typing\.Literal\[(.+)\]\. Got value: (.*)", text):
        text = _choose(re.findall(r"[^', ]+", match[1]), match[2])
    if match := re.fullmatch(r"Expected one of (.+), got (\S*)", text):
        return OptionError(key, text + suggestion(match[2], match[1].split(", ")))
    text = re.sub(r"^Expected an? (?:<class '(\w+)'>|typing\.(.+))\. Got value: ", r"Expected \1\2, got ", text)
    return OptionError(key, f"{text}.")


def _reason(cause: BaseException) -> str | None:
    """Explain a cause by its attributes; None if they say nothing."""
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, argparse.ArgumentError):
        return f"{cause}."
    if isinstance(cause, AttributeError) and isinstance(cause.obj, ModuleType) and cause.name:
        names = [name for name, _ in inspect.getmembers(cause.obj, inspect.isclass)]
        return f"Expected a class in {cause.obj.__name__}, got {cause.name!r}{suggestion(cause.name, names)}"
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        package, _, name = cause.name.rpartition(".")
        paths = getattr(sys.modules.get(package), "__path__", [])
        near = suggestion(name, [module.name for module in pkgutil.iter_modules(paths)])
        return f"Expected a module that is installed, got {cause.name!r}{near}"
    return None


def _require(names: list[str], parser: argparse.ArgumentParser) -> str:
    command, _, option = names[0].partition(".")
    if option == "model.autoencoder":
        wanted = "--ckpt_path FILE" if command != "fit" else "--config FILE or --model.autoencoder NAME"
        return f"Expected an autoencoder to {command}, got none; give {wanted}."
    shown = {
        name: "--" + action.dest if action.option_strings else str(action.metavar or action.dest)
        for action in parser._actions
        for name in (action.dest, str(action.metavar))
    }
    words = [shown.get(name, f"--{name.lstrip('-')}") for name in names]
    return f"Expected {' and '.join(words)}, got none; {parser.prog} --help says what it is."


def _innermost(text: str) -> str:
    """Select the most likely reason if a value fits none of the types of a union."""
    _, found, rest = text.partition("Errors: - ")
    if not found:
        return text
    reasons, _, given = rest.partition(" Given value type: ")
    value = given.partition("Given value: ")[2].partition(" - Expected a ")[0]
    named = [reason for reason in reasons.split(" - ") if not re.match(r"Expected an? (<class|typing)", reason)]
    choices = re.findall(r"'([\w.-]+)'", " ".join(re.findall(r"typing\.Literal\[.*?\]", reasons)))
    if named:
        return named[0]
    if choices:
        return _choose(choices, value)
    kinds = re.findall(r"<class '([\w.]+)'>", reasons)
    return f"Expected {' or '.join(kind.rpartition('.')[2] for kind in kinds)}, got {value}" if kinds else text


def _choose(choices: list[str], value: str) -> str:
    return f"Expected one of {', '.join(choices)}, got {value}"


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of the parser and of its subcommands, without dashes."""
    parsers = [parser]
    for action in parser._actions:
        parsers += action.choices.values() if isinstance(action.choices, dict) else []
    names = {name.lstrip("-") for each in parsers for name in each._option_string_actions}
    return {name for name in names if not name.endswith(".help")}


def _classes() -> list[type]:
    """Return all classes that a config may name and that are imported so far."""
    found: list[type] = []
    waiting = [getattr(sys.modules[module], name) for module, name in _ROOTS if module in sys.modules]
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].__subclasses__()
    return found
