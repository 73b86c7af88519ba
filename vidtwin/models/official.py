"""Reading of checkpoints of the released VidTwin: tensor names, and the sizes that follow from tensor shapes.

The arithmetic is in the sibling files.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vidtwin import weights
from vidtwin.errors import UserError
from vidtwin.layers.patches import sincos_1d, sincos_2d

# Unused parameters of the released model, and buffers that are computed here.
_UNUSED = re.compile(r"loss\..*|encoder\.final_layer\..*|decoder\.x_embedder\..*|(en|de)coder\.pos_embed(_temporal)?")

# Arguments of `VidTwin` without tensors that give the released arithmetic.
ARITHMETIC = {"structure_shortcut": 0, "dynamics_shortcut": False}

# Official name → ours; the first match counts.
_NAMES = [
    (r"(encoder|decoder)\.blocks\.(\d+)\.scale_shift_table", r"\1.transformer.blocks.\2.modulation"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.attn\.(.+)", r"\1.transformer.blocks.\2.spatial_attention.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.attn_temp\.(.+)", r"\1.transformer.blocks.\2.temporal_attention.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.fc1\.(.+)", r"\1.transformer.blocks.\2.mlp.0.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.fc2\.(.+)", r"\1.transformer.blocks.\2.mlp.2.\3"),
    (r"encoder\.x_embedder\.proj\.(.+)", r"encoder.patch_embed.\1"),
    (r"decoder\.final_layer\.scale_shift_table", r"decoder.modulation"),
    (r"decoder\.final_layer\.linear\.(.+)", r"decoder.linear.\1"),
    (r"temporal_qformer\.query_embeds", r"structure.qformer.queries"),
    (r"temporal_qformer\.qformer\.layernorm\.(.+)", r"structure.qformer.norm.\1"),
    (r"conv_in\.(.+)", r"structure.conv_in.\1"),
    (r"content_downsample_blocks\.(\d+)\.(.+)", r"structure.downsample.\1.\2"),
    (r"bottle_down\.(.+)", r"structure.head.\1"),
    (r"bottle_up\.0\.(.+)", r"structure.embed.0.\1"),
    (r"content_upsample_blocks\.(\d+)\.(.+)", r"structure.upsample.\1.\2"),
    (r"conv_out\.(.+)", r"structure.conv_out.\1"),
    (r"cont_emb\.0\.(.+)", r"structure.to_features.0.\1"),
    (r"cont_emb\.2\.(.+)", r"structure.to_frames.\1"),
    (r"downsample_motion_module\.(\d+)\.(.+)", r"dynamics.downsample.\1.\2"),
    (r"motion_head\.(.+)", r"dynamics.head.\1"),
    (r"motion_emb\.(\d+)\.(.+)", r"dynamics.embed.\1.\2"),
    (r"up_motion\.(\d+)\.(.+)", r"dynamics.upsample.\1.\2"),
]
_QFORMER_LAYER = r"temporal_qformer\.qformer\.encoder\.layer\.(\d+)\."
_QFORMER_NAMES = {
    "attention.output.dense": "self_attention.proj",
    "attention.output.LayerNorm": "self_norm",
    "crossattention.attention.query": "cross_attention.q",
    "crossattention.output.dense": "cross_attention.proj",
    "crossattention.output.LayerNorm": "cross_norm",
    "intermediate_query.dense": "mlp.0",
    "output_query.dense": "mlp.2",
    "output_query.LayerNorm": "mlp_norm",
}
# Projections that are separate tensors in the released model and fused here, in this order.
_FUSED = {
    "self_attention.qkv": ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    "cross_attention.kv": ["crossattention.attention.key", "crossattention.attention.value"],
}


def load(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Read an official checkpoint without running code from it.

    Returns:
        Arguments of `VidTwin`, and the state dict in our names.

    Raises:
        UserError: The file is not such a checkpoint.
    """
    return convert(_read(path), path)


def is_official(state: Mapping[str, object]) -> bool:
    """Return whether tensors have the names of a released checkpoint."""
    return {"encoder.x_embedder.proj.weight", "temporal_qformer.query_embeds"} <= set(state)


def convert(state: dict[str, Tensor], path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Convert the tensors of an official checkpoint, as `load` does; `path` is its name in messages."""
    sizes = _sizes(state, path)
    _check_positions(state, path)
    return sizes, _rename(state, path)


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise UserError(
            f"Expected an official VidTwin checkpoint (a .ckpt or .safetensors file), got the folder {path}."
        )
    state = weights.read(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"Expected an official VidTwin checkpoint, got {path} without any tensor.")
    return tensors


def _sizes(state: dict[str, Tensor], path: Path) -> dict[str, int]:
    def shape(name: str, axes: int) -> torch.Size:
        if name not in state:
            raise UserError(f"Expected an official VidTwin checkpoint, got {path} without the tensor {name}.")
        if state[name].ndim != axes:
            raise UserError(f"Expected {name} with {axes} axes in {path}, got {tuple(state[name].shape)}.")
        return state[name].shape

    hidden_size, _, _, patch_size, _ = shape("encoder.x_embedder.proj.weight", 5)
    num_queries, query_size = shape("temporal_qformer.query_embeds", 2)
    intermediate = shape("temporal_qformer.qformer.encoder.layer.0.intermediate_query.dense.weight", 2)
    shape("encoder.blocks.0.attn.qkv.weight", 2)
    layer = re.compile(_QFORMER_LAYER + r"(crossattention)?")
    layers = [match for name in state if (match := layer.match(name))]
    reading = sorted({int(match[1]) for match in layers if match[2]})
    return {
        "num_frames": shape("encoder.pos_embed_temporal", 3)[1],
        "resolution": patch_size * math.isqrt(shape("encoder.pos_embed", 3)[1]),
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(match[1]) for name in state if (match := re.match(r"encoder\.blocks\.(\d+)\.", name))),
        "num_queries": num_queries,
        "structure_channels": shape("bottle_up.0.weight", 4)[1],
        "structure_downsamples": len(_indices(state, "content_downsample_blocks")),
        "dynamics_channels": shape("motion_emb.0.weight", 2)[1],
        "dynamics_downsamples": len(_indices(state, "downsample_motion_module")),
        "structure_width": shape("conv_in.weight", 4)[0],
        "query_size": query_size,
        "qformer_depth": 1 + max(int(match[1]) for match in layers),
        "qformer_intermediate_size": intermediate[0],
        "qformer_cross_every": reading[1] - reading[0] if len(reading) > 1 else len(layers),
    }


def _indices(state: dict[str, Tensor], prefix: str) -> set[str]:
    return {name.split(".")[1] for name in state if name.startswith(f"{prefix}.")}


def _rename(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if _UNUSED.fullmatch(name):
            continue
        if match := re.match(_QFORMER_LAYER, name):
            module, _, kind = name[match.end() :].rpartition(".")
            ours = f"structure.qformer.layers.{match[1]}.{_QFORMER_NAMES.get(module, module)}.{kind}"
            fused = next(((new, parts) for new, parts in _FUSED.items() if module in parts), None)
            if fused:
                ours = f"structure.qformer.layers.{match[1]}.{fused[0]}.{kind}"
                value = _fuse(state, [f"{match[0]}{part}.{kind}" for part in fused[1]], path)
        else:
            ours = next((re.sub(theirs, new, name) for theirs, new in _NAMES if re.fullmatch(theirs, name)), name)
        if ours == "encoder.patch_embed.weight":
            value = value.flatten(1)  # a convolution whose stride is its kernel is a product over patches
        elif ours == "structure.to_frames.weight" and value.ndim == 3:
            value = value.squeeze(-1)  # a convolution of kernel 1 whose channels are the queries
        renamed[ours] = value.float()
    return renamed


def _fuse(state: dict[str, Tensor], parts: list[str], path: Path) -> Tensor:
    missing = [part for part in parts if part not in state]
    if missing:
        raise UserError(f"Expected an official VidTwin checkpoint, got {path} without the tensor {missing[0]}.")
    shapes = {part: tuple(state[part].shape) for part in parts}
    if len(set(shapes.values())) > 1 or () in shapes.values():
        raise UserError(f"Expected tensors of one shape in {path}, got {shapes}.")
    return torch.cat([state[part] for part in parts])


def _check_positions(state: dict[str, Tensor], path: Path) -> None:
    """Check the stored position embeddings against the computed ones, since others would change the results."""
    for part in ("encoder", "decoder"):
        for suffix in ("", "_temporal"):
            name = f"{part}.pos_embed{suffix}"
            if name not in state:
                raise UserError(f"Expected an official VidTwin checkpoint, got {path} without the tensor {name}.")
            stored, wanted = state[name], state[f"encoder.pos_embed{suffix}"].shape
            grid = math.isqrt(wanted[1])
            time = torch.arange(wanted[1])
            expected = sincos_1d(wanted[2], time) if suffix else sincos_2d(wanted[2], grid, grid)
            if stored.shape != (1, *expected.shape) or not torch.allclose(stored[0].double(), expected, atol=1e-5):
                raise UserError(f"Expected the released position embeddings in {path}, got others in {name}.")
