"""Every registered autoencoder keeps the interface's promises."""

import pytest

from vidtwin import plugins
from vidtwin.testing import check_autoencoder

GROUP = "vidtwin.autoencoders"

# Arguments that make each built-in autoencoder tiny, by its short name, and the clip that it is checked on.
TINY = {
    "vidtwin": (
        {
            "num_frames": 4,
            "resolution": 24,
            "patch_size": 8,
            "hidden_size": 24,
            "depth": 1,
            "num_heads": 2,
            "num_queries": 3,
            "structure_width": 4,
            "query_size": 16,
            "qformer_depth": 2,
            "qformer_heads": 2,
            "qformer_intermediate_size": 16,
        },
        {"num_frames": 4},
    ),
    "magvit2": (
        {"channels": 8, "multipliers": [1, 1, 2, 2], "num_blocks": 1, "latent_channels": 6},
        {"num_frames": 8, "resolution": 16},
    ),
    "cmd": (
        {
            "num_frames": 4,
            "resolution": 16,
            "patch_size": 4,
            "motion_channels": 2,
            "hidden_size": 16,
            "depth": 1,
            "num_heads": 2,
        },
        {"num_frames": 4},
    ),
    "ivideogpt": (
        {
            "resolution": 28,
            "inner_resolution": 32,
            "channels": [32, 32],
            "layers_per_block": 1,
            "latent_channels": 8,
            "codebook_size": 16,
            "dynamics_codebook_size": 12,
            "norm_groups": 8,
            "attention_resolution": 16,
        },
        {"num_frames": 4},
    ),
    "wfvae": (
        {"channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4, "num_blocks": 1},
        {"num_frames": 5, "resolution": 16},
    ),
    "odvae": (
        {"channels": 4, "multipliers": [1, 1, 1, 1], "num_blocks": 1, "norm_groups": 1},
        {"num_frames": 5, "resolution": 16},
    ),
    "opensora": (
        {"channels": [4, 4, 8], "num_blocks": 1, "frame_channels": [4, 8], "frame_blocks": 1, "norm_groups": 1}
        | {"chunk_frames": 5},
        {"num_frames": 7, "resolution": 8},
    ),
    "cvvae": (
        {"channels": 4, "multipliers": [1, 1, 1, 1], "num_blocks": 1, "norm_groups": 1, "chunk_frames": 4},
        {"num_frames": 5, "resolution": 8},
    ),
    "mean_colour": ({"num_frames": 4, "resolution": 16}, {"num_frames": 4}),
    "temporal_mean": ({"num_frames": 4, "resolution": 16}, {"num_frames": 4}),
}


def tiny(name, value):
    """Arguments and clip of one autoencoder; a third-party plug-in is checked with its own defaults."""
    if name in TINY:
        return TINY[name]
    if value.startswith("vidtwin."):
        pytest.fail(f"{name} ({value}) has no tiny arguments; add them to TINY in tests/test_contract.py", False)
    return {}, {}


# tests/baselines/test_library.py and its neighbours check the adapters of libraries, in the worker that imports these.
NAMES = [name for name, entry in plugins.available(GROUP).items() if "baselines.library" not in entry.value]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_registered_autoencoder_keeps_the_contract(name):
    arguments, clip = tiny(name, plugins.available(GROUP)[name].value)
    check_autoencoder(plugins.load(name, GROUP)(**arguments), **clip)


def test_every_tiny_configuration_belongs_to_a_registered_autoencoder():
    absent = sorted(set(TINY) - set(plugins.available(GROUP)))
    assert not absent, f"{absent} are in TINY but not registered; after a change of pyproject.toml install again"


def test_a_new_autoencoder_without_tiny_arguments_fails_with_the_place_to_add_them():
    with pytest.raises(pytest.fail.Exception, match=r"new .* add them to TINY in tests/test_contract\.py"):
        tiny("new", "vidtwin.baselines.new:New")
    assert tiny("theirs", "their_package:Theirs") == ({}, {})
