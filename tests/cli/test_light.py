"""Help and refusals that need no model import neither torch nor Lightning."""

import subprocess
import sys

CODE = """
import contextlib, io, sys
from vidtwin.cli import main
from vidtwin.cli.commands import TABLE

def heavy():
    return sorted({"torch", "lightning"} & set(sys.modules))

for command in TABLE:
    if command not in ("fit", "validate", "predict", "replay", "plan"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = main([command, "--help"])
        assert code == 0 and command in printed.getvalue() and not heavy(), (command, code, heavy())
refusals = {
    "reconstruct absent.mp4 --ckpt_path absent.ckpt": "Expected a video at absent.mp4",
    f"reconstruct {sys.executable} --ckpt_path absent.ckpt": "got none at absent.ckpt",
    "encode videos --out latents --ckpt_pth last.ckpt": "did you mean 'ckpt_path'?",
    "decode latents --out latents --skip_exist": "did you mean 'skip_existing'?",
    "convert absent.ckpt out": "or released weights (a file or a folder), got none at absent.ckpt",
    "convert hf://owner/name out": "--ckpt_path takes it as it is",
    "export --ckpt_path absent.ckpt --out new": "got none at absent.ckpt",
    "reenact --structure a.mp4 --dynamics b.mp4 --out o --ckpt_path absent.ckpt": "Expected a video at a.mp4",
    "configs .": "nothing was overwritten",
    "check --config absent.yaml": "Expected a config at absent.yaml",
    "cache out --config absent.yaml": "Expected a config at absent.yaml",
    "fit --config absent.yaml": "Expected a config at absent.yaml",
    "fit --confg absent.yaml": "did you mean 'config'?",
    "validate --ckpt_path absent.ckpt": "got none at absent.ckpt",
    "test --config absent.yaml": "Expected a config at absent.yaml",
    "test --resultsdir results": "did you mean 'results_dir'?",
    "fit --trainer.max_step 3": "did you mean 'trainer.max_steps'?",
    "fit --data ucf11": "did you mean 'ucf101'?",
    "cache out --epocs 2": "did you mean 'epochs'?",
    "fit --data absent.yaml": "Expected a config at absent.yaml",
    "predict --ckpt_path absent.ckpt": "got none at absent.ckpt",
    "fit --init_from absent": "Expected a checkpoint, a folder of weights or hf://owner/name, got none at absent",
    "replay absent.pt": "Expected the dump of a skipped step, got none at absent.pt",
}
for words, expected in refusals.items():
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        code = main(words.split())
    line = printed.getvalue()
    assert code == 2 and line.count("\\n") == 1 and expected in line and not heavy(), (words, code, line, heavy())
print("light")
"""


def test_help_and_refusals_import_neither_torch_nor_lightning(tmp_path):
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "light", done.stderr
