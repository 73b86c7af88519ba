"""`vidtwin convert`: its arguments. Nothing heavy is imported at the top."""

_DESCRIPTION = """\
Turn weights into the folder that from_pretrained and --ckpt_path take: config.json, model.safetensors, README.md.

  vidtwin convert vidtwin_structure_7_7_8_dynamics_7_8.ckpt my_vidtwin
  vidtwin convert ivideogpt-oxe-64-act-free my_tokenizer --model ivideogpt
  vidtwin convert runs/vidtwin/checkpoints/last.ckpt my_vidtwin --use_ema

IN is one of
  a checkpoint of `vidtwin fit`: the class and its arguments stand in it. What is known of the training (steps, data,
    loss) goes into config.json, from the checkpoint and from config.yaml beside its folder, or --config; of paths the
    last part alone;
  released weights: --model says of which class, by default vidtwin. Further options are the arguments of that class's
    from_official, such as --num_heads of vidtwin: `vidtwin convert --model NAME --help` lists them.

Exit code: 0 written, 2 not; then OUT is as it was.
"""


def convert_command(argv: list[str]) -> int:
    """Turn released weights or a checkpoint into the folder of from_pretrained: vidtwin convert IN OUT"""
    from vidtwin.apply import convert

    return convert.run(argv, _DESCRIPTION)
