"""RoPE's settings of a configuration, whichever transformers reads it: 4 and 5 keep them in different places."""

from typing import Any

import transformers
from transformers import PretrainedConfig

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
SLIDING, FULL = "sliding_attention", "full_attention"


def all_rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the settings as transformers 5 keeps them: ``rope_theta``, ``rope_type`` and what that type needs.

    Where local layers have others than global ones, there is such a dictionary for each kind of layer.
    """
    values = config.to_dict()
    if parameters := values.get("rope_parameters"):
        return parameters
    scaling = dict(values.get("rope_scaling") or {"rope_type": "default"})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    parameters = {"rope_theta": values["rope_theta"], **scaling}
    if (share := values.get("partial_rotary_factor")) is not None:
        parameters["partial_rotary_factor"] = share
    if (local := values.get("rope_local_base_freq")) is not None:
        return {FULL: parameters, SLIDING: {"rope_theta": local, "rope_type": "default"}}
    return parameters


def rope_parameters(config: PretrainedConfig, layer: int) -> dict[str, Any]:
    """Returns the settings of one layer."""
    parameters = all_rope_parameters(config)
    return parameters[config.layer_types[layer]] if FULL in parameters else parameters


def read_as_version_5(config: PretrainedConfig) -> None:
    """transformers 4 overlooks the settings of a configuration that 5 wrote: puts them where it looks."""
    parameters = getattr(config, "rope_parameters", None)
    if transformers.__version__.startswith("4.") and parameters:
        from .export.hf.configuration_ir import rope_of_version_4  # imports every family, for 4 alone

        config.rope_scaling = None
        for name, value in rope_of_version_4(parameters).items():
            setattr(config, name, value)
