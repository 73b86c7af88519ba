"""List the commands, and run one. `vidtwin --help` reads this table and imports no command.

A target is a function of the arguments that returns the exit code ("module:function"), or a module with `USAGE`,
`DESCRIPTION`, `add_options(parser)` and `run(options)`. With `run(options, unknown)` the module judges options that its
parser does not know: pairs of name and value. `add_more_options(parser, options, wants_help)` of a module adds options
that depend on others. Other packages add functions as entry points of the group `vidtwin.commands`.
"""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from vidtwin import plugins
from vidtwin.cli import bases
from vidtwin.cli.messages import ParserExit
from vidtwin.errors import UserError, suggestion

GROUP = "vidtwin.commands"


class Command(NamedTuple):
    """A line of the table.

    Attributes:
        summary: For `vidtwin --help`.
        target: "module:function", or the name of a module.
    """

    summary: str
    target: str


TABLE: dict[str, Command] = {
    "fit": Command(
        "Train an autoencoder: vidtwin fit --config configs/vidtwin_base.yaml --data.root PATH",
        "vidtwin.cli.trainer_commands:fit",
    ),
    "validate": Command("Measure an autoencoder on the validation clips.", "vidtwin.cli.trainer_commands:validate"),
    "test": Command(
        "Measure an autoencoder, or a list of them, on the test clips: table, plots, report.",
        "vidtwin.cli.trainer_commands:test",
    ),
    "predict": Command("Write latents and reconstruction of each test clip.", "vidtwin.cli.trainer_commands:predict"),
    "replay": Command(
        "Run a step again that training skipped, and say where it breaks: vidtwin replay DUMP",
        "vidtwin.cli.trainer_commands:replay",
    ),
    "plan": Command(
        "Predict memory, speed and duration of a training: vidtwin plan --config configs/vidtwin_base.yaml",
        "vidtwin.cli.trainer_commands:plan",
    ),
    "plugins": Command(
        "List the autoencoders, data modules and commands that installed packages register.",
        "vidtwin.cli.small_commands:list_plugins",
    ),
    "configs": Command(
        "Copy the configs that come with the package: vidtwin configs [FOLDER]",
        "vidtwin.cli.small_commands:copy_configs",
    ),
    "cache": Command(
        "Write decoded clips, or video files, as shards: vidtwin cache OUT --config FILE",
        "vidtwin.cli.cache:cache_command",
    ),
    "card": Command(
        "Write the model card of a checkpoint: vidtwin card --ckpt_path last.ckpt --results RESULTS --out README.md",
        "vidtwin.benchmark.card_command",
    ),
    "check": Command(
        "Hold an autoencoder to the promises of the interface: vidtwin check NAME",
        "vidtwin.cli.check:check_command",
    ),
    "convert": Command(
        "Turn released weights or a checkpoint into the folder of from_pretrained: vidtwin convert IN OUT",
        "vidtwin.apply.convert",
    ),
    "decode": Command("Decode latents on disk to videos: vidtwin decode LATENTS --out DIR", "vidtwin.apply.decode"),
    "decouple": Command(
        "Show what each latent carries: vidtwin decouple a.mp4 --out DIR --ckpt_path last.ckpt",
        "vidtwin.apply.decouple",
    ),
    "doctor": Command(
        "Check a folder of videos and list those to leave out: vidtwin doctor DIR",
        "vidtwin.datamodules.doctor.command",
    ),
    "encode": Command(
        "Encode videos to latents on disk: vidtwin encode IN... --out LATENTS --ckpt_path last.ckpt",
        "vidtwin.apply.encode",
    ),
    "export": Command(
        "Write encoder and decoder as torch.export or ONNX programs: vidtwin export --ckpt_path PATH --out DIR",
        "vidtwin.apply.export",
    ),
    "generate": Command(
        "Generate videos by a diffusion model: vidtwin generate --ckpt_path last.ckpt --class_name Archery --out DIR",
        "vidtwin.apply.generate",
    ),
    "prepare": Command(
        "Unpack and check a data set: vidtwin prepare ucf101 UCF101.rar UCF101TrainTestSplits-RecognitionTask.zip",
        "vidtwin.datamodules.ucf101.prepare",
    ),
    "reconstruct": Command(
        "Reconstruct videos: vidtwin reconstruct a.mp4 b.mp4 --ckpt_path last.ckpt",
        "vidtwin.apply.reconstruct",
    ),
    "reenact": Command(
        "Combine latents of two videos: vidtwin reenact --structure A --dynamics B --out DIR --ckpt_path last.ckpt",
        "vidtwin.apply.reenact",
    ),
    "report": Command(
        "Make table, plots and page of a results folder again: vidtwin report RESULTS",
        "vidtwin.benchmark.report_command",
    ),
    "score": Command(
        "Measure the generation FVD of generated videos: vidtwin score GENERATED --data ucf101 --data.root PATH",
        "vidtwin.cli.score:score_command",
    ),
    "study make": Command(
        "Make a blinded rating study: vidtwin study make --results RESULTS --out STUDY",
        "vidtwin.benchmark.study.make_command",
    ),
    "study score": Command(
        "Turn a study's answers into mean opinion scores: vidtwin study score ANSWERS... --key FILE --out DIR",
        "vidtwin.benchmark.study.score_command",
    ),
}


def summaries() -> dict[str, str]:
    """Return a line for each command; those of other packages are not imported."""
    found = {name: command.summary for name, command in TABLE.items()}
    others = {name: f"({entry.value})" for name, entry in plugins.available(GROUP).items()}
    return found | {name: text for name, text in others.items() if name not in found}


def run(name: str, argv: list[str]) -> int:
    """Run a command, whose name may go on in the first argument → exit code. Raises `UserError` for invalid input."""
    if name not in TABLE and argv and f"{name} {argv[0]}" in TABLE:
        name, argv = f"{name} {argv[0]}", argv[1:]
    if name in TABLE:
        module, _, function = TABLE[name].target.partition(":")
        loaded = import_module(module)
        try:
            return int(getattr(loaded, function)(argv) if function else _run_module(name, loaded, argv))
        except ParserExit as end:
            return int(end.code or 0)
    if name in plugins.available(GROUP):
        command = plugins.load(name, GROUP)
        try:
            return int(command(argv))
        except SystemExit as end:  # as argparse ends: with 0 after --help, with 2 after a mistake
            if end.code not in (None, 0, 2):
                raise
            return int(end.code or 0)
    raise UserError(f"Expected a command, got {name!r}{suggestion(name, summaries())}")


def _run_module(name: str, module: Any, argv: list[str]) -> int:
    from vidtwin.cli.parser import command_parser, config_paths, read_config, wants_help

    parser = command_parser(name, module.USAGE, module.DESCRIPTION)
    module.add_options(parser)
    known, unknown = parser.split_unknown(argv)
    judges_unknown = "unknown" in inspect.signature(module.run).parameters
    words = known if judges_unknown else argv
    if hasattr(module, "add_more_options"):
        needed = [word for word in known if word not in ("-h", "--help")]
        module.add_more_options(parser, parser.parse_words(needed), wants_help(argv))
        words = argv  # which the parser then knows in full
    options = parser.parse_words(words)
    read_config(config_paths(argv))  # refuses a missing file before torch is imported
    if "config" in options:
        options.read_model = _read_model
        options.read_config = lambda path: read_config(bases.chain(path))
    return int(module.run(options, unknown) if judges_unknown else module.run(options))


def _read_model(config: str, source: Path | None = None) -> Any:
    from vidtwin.cli import model_config
    from vidtwin.cli.parser import read_config

    if source is not None:
        plugins.check_trusted(read_config(bases.chain(config, foreign=True)).get("model"), source)
    return model_config.read(config, foreign=source is not None)
