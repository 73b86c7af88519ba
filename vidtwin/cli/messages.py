"""Turn jsonargparse's messages into one line each, with a suggestion. Import nothing heavy."""

import argparse
import inspect
import pkgutil
import re
import sys
from pathlib import Path

from vidtwin.errors import suggestion

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


class Answered(SystemExit):
    """Ended by a parser that has printed its answer: --help, --print_config."""


def shorten(message: str, parser: argparse.ArgumentParser) -> str:
    """jsonargparse's message as one line: the innermost reason, and what was probably meant."""
    text = re.sub(r"\s+", " ", message).strip().rstrip(".")
    if match := re.search(r"arguments are required: (\w+)\.model\.autoencoder", text):
        wanted = "--ckpt_path FILE" if match[1] != "fit" else "--config FILE or --model.autoencoder NAME"
        return f"Expected an autoencoder to {match[1]}, got none; give {wanted}."
    if match := re.search(r"arguments are required: (.+)$", text):
        bare = [str(action.metavar or action.dest) for action in parser._actions if not action.option_strings]
        dests = {action.dest: str(action.metavar or action.dest) for action in parser._actions}
        words = [word if word in bare else f"--{word.lstrip('-')}" for word in match[1].split(", ")]
        words = [dests[word[2:]] if dests.get(word[2:]) in bare else word for word in words]
        return f"Expected {' and '.join(words)}, got none; {parser.prog} --help says what it is."
    if "Union subtypes" in text:
        text = _innermost(text)
    text = re.sub(r"- Expected a path but \S+ either not accessible or invalid - ", "", text)
    text = text.replace("unrecognized arguments:", "Expected options that exist, got")
    text = re.sub(r"Expected a dot import path string: (\S+)", r"Expected a class path, got '\1'", text)
    # An inner parser's error comes back through the outer one's, with its suggestion.
    return text if text.endswith("'?") else text + _meant(text, parser)


def _innermost(text: str) -> str:
    """Of the reasons why a value fits none of several types, the one about the type that was meant."""
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', text))
    reasons, _, given = text.rpartition("Errors: - ")[2].partition(" Given value type: ")
    value = given.partition("Given value: ")[2].partition(" - Expected a ")[0]
    named = [reason for reason in reasons.split(" - ") if not re.match(r"Expected an? (<class|typing)", reason)]
    choices = re.findall(r"'([\w.-]+)'", " ".join(re.findall(r"typing\.Literal\[.*?\]", reasons)))
    if named:
        reason = re.sub(r'^Parser key "[\w.]+": ', "", named[0])
    elif choices:
        reason = f"Expected one of {', '.join(choices)}, got {value}"
    else:
        kinds = re.findall(r"<class '([\w.]+)'>", reasons)
        reason = f"Expected {' or '.join(kind.rpartition('.')[2] for kind in kinds)}, got {value}"
    return f"{key}: {reason}".rstrip(".")


def _meant(text: str, parser: argparse.ArgumentParser) -> str:
    """The end of the message: the nearest thing that exists, or a full stop."""
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        return suggestion(match[2], dir(sys.modules[match[1]]) if match[1] in sys.modules else [])
    if match := re.search(r"No module named '([\w.]+)\.(\w+)'", text):
        paths = getattr(sys.modules.get(match[1]), "__path__", [])
        return suggestion(match[2], [module.name for module in pkgutil.iter_modules(paths)])
    if match := re.search(r"File does not exist: '(.+?)'", text):
        path = Path(match[1])
        return suggestion(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
    if match := re.search(r"Expected a class path, got '(\w+)'", text):
        return suggestion(match[1], [cls.__name__ for cls in _classes()])
    if match := re.search(r"got --([\w.-]+)", text):
        return suggestion(match[1].replace("-", "_"), [name.lstrip("-") for name in _options(parser)])
    if match := re.search(r"[Oo]ption '([\w.]+)'", text):
        names = [name.rpartition(".")[2] for name in _options(parser)]
        return suggestion(match[1].rpartition(".")[2], sorted({*names, *_arguments()}))
    return "."


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of the parser and of its subcommands."""
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                names |= set(sub._option_string_actions)
    return names


def _classes() -> list[type]:
    """All classes that a config may name and that are imported so far."""
    found: list[type] = []
    waiting = [getattr(sys.modules[module], name) for module, name in _ROOTS if module in sys.modules]
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].__subclasses__()
    return found


def _arguments() -> set[str]:
    """Names of their arguments, which are no options of the parser."""
    return {name for cls in _classes() for name in inspect.signature(cls).parameters}
