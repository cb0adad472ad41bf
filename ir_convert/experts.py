"""Weights of a mixture of experts: a tensor for each expert in checkpoints, one for all in the modules of transformers 5."""

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

PACKED, PARTS = "gate_up_proj", ("gate_proj", "up_proj")
PLAIN = "down_proj"
# What Mixtral's files call the module and the projections.
MIXTRAL = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


def own_name(name: str) -> str:
    """Returns the name that a tensor of Mixtral's has in the modules of transformers 5, an expert's by itself."""
    for stored, own in MIXTRAL.items():
        name = name.replace(stored, own)
    return name


def read_as_version_5(config: PretrainedConfig) -> None:
    """transformers 4 overlooks the number of experts in a configuration that 5 wrote: puts it where it looks."""
    count = getattr(config, "num_local_experts", None)
    if transformers.__version__.startswith("4.") and count is not None and hasattr(config, "num_experts"):
        config.num_experts = count


def fit_experts(tensors: dict[str, Tensor], module: nn.Module, experts: str) -> dict[str, Tensor]:
    """Returns a layer's tensors as the module wants them, with experts packed or apart; names are those in the layer.

    Args:
        tensors: as stored, in either form.
        module: the decoder layer that they are for.
        experts: where it has them, e.g. ``mlp.experts``.
    """
    packed = f"{experts}.{PACKED}"
    wanted = dict(module.named_parameters())
    if packed in wanted and packed not in tensors:
        return _pack(tensors, experts, len(wanted[packed]))
    if packed not in wanted and packed in tensors:
        return _unpack(tensors, experts)
    return tensors


def _pack(tensors: dict[str, Tensor], experts: str, count: int) -> dict[str, Tensor]:
    """``experts.E.gate_proj.weight`` ``[width, hidden]``, ... -> ``experts.gate_up_proj`` ``[experts, 2 width, hidden]``, ..."""
    taken = [{name: tensors[f"{experts}.{index}.{name}.weight"] for name in (*PARTS, PLAIN)} for index in range(count)]
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{experts}.")}
    return rest | {
        f"{experts}.{PACKED}": torch.stack([torch.cat([expert[name] for name in PARTS]) for expert in taken]),
        f"{experts}.{PLAIN}": torch.stack([expert[PLAIN] for expert in taken]),
    }


def _unpack(tensors: dict[str, Tensor], experts: str) -> dict[str, Tensor]:
    """The inverse of ``_pack``."""
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{experts}.")}
    for index, (both, down) in enumerate(
        zip(tensors[f"{experts}.{PACKED}"], tensors[f"{experts}.{PLAIN}"], strict=True)
    ):
        parts = dict(zip(PARTS, both.chunk(2), strict=True)) | {PLAIN: down}
        rest |= {f"{experts}.{index}.{name}.weight": part.contiguous() for name, part in parts.items()}
    return rest
