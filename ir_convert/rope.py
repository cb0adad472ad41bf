"""RoPE's settings of a configuration, whichever transformers reads it: 4 and 5 keep them in different places."""

import inspect
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig

from .errors import UserError, one_line

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
SLIDING, FULL = "sliding_attention", "full_attention"


def all_rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the settings as transformers 5 keeps them: ``rope_theta``, ``rope_type`` and what that type needs.

    Where local layers have others than global ones, there is such a dictionary for each kind of layer.
    """
    values = config.to_dict()
    if parameters := values.get("rope_parameters"):
        # Settings of all layers may lie beside those of each kind, and are then not read.
        return {kind: parameters[kind] for kind in (FULL, SLIDING) if kind in parameters} or parameters
    scaling = dict(values.get("rope_scaling") or {"rope_type": "default"})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    parameters = {"rope_theta": values["rope_theta"], **scaling}
    if (share := values.get("partial_rotary_factor")) is not None:
        parameters["partial_rotary_factor"] = share
    local = values.get("rope_local_base_freq")
    if local is None and values["model_type"].endswith("olmo3"):  # its local layers have no scaling
        local = parameters["rope_theta"]
    if local is not None:
        return {FULL: parameters, SLIDING: {"rope_theta": local, "rope_type": "default"}}
    return parameters


def rope_parameters(config: PretrainedConfig, layer: int) -> dict[str, Any]:
    """Returns the settings of one layer."""
    parameters = all_rope_parameters(config)
    return parameters[config.layer_types[layer]] if FULL in parameters else parameters


def rotary_embedding(decoder: Any, config: PretrainedConfig, layer: int) -> tuple[Any, str | None]:
    """Returns the module that gives a layer's cosines and sines, and the kind of layer that it has to be told; None for none."""
    kinds: Any = getattr(config, "layer_types", None)
    if hasattr(decoder, "rotary_embs"):  # transformers 4, OLMo 3
        return decoder.rotary_embs[kinds[layer]], None
    if kinds and hasattr(decoder, "rotary_emb_local"):  # transformers 4, Gemma 3
        return decoder.rotary_emb_local if kinds[layer] == SLIDING else decoder.rotary_emb, None
    return decoder.rotary_emb, kinds[layer] if isinstance(decoder.rotary_emb.rope_type, dict) else None


def rebuilt(rotary: Any) -> Any:
    """Returns a rotary embedding as it was made, on the device that is current: it computes its values from its configuration."""
    if isinstance(rotary, nn.ModuleDict):
        return nn.ModuleDict({kind: rebuilt(module) for kind, module in rotary.items()})
    unscaled = "rope_type" in inspect.signature(type(rotary)).parameters and rotary.rope_type == "default"
    return type(rotary)(config=rotary.config, **({"rope_type": "default"} if unscaled else {}))


def read_as_version_5(config: PretrainedConfig) -> None:
    """transformers 4 overlooks the settings of a configuration that 5 wrote: puts them where it looks.

    Raises:
        UserError: it has no place for them, or they are damaged.
    """
    parameters = getattr(config, "rope_parameters", None)
    if transformers.__version__.startswith("4.") and parameters:
        from .export.hf.configuration_ir import require_one_base, rope_of_version_4  # imports every family, for 4 alone

        try:
            require_one_base(config.model_type, parameters)
            spelled = rope_of_version_4(parameters)
        except ValueError as error:
            raise UserError(str(error)) from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"rope_parameters in config.json are not as transformers writes them: {one_line(error)}"
            ) from error
        config.rope_scaling = None
        for name, value in spelled.items():
            setattr(config, name, value)
