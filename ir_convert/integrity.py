"""Whether a checkpoint's weights are whole, and those that its configuration is of: seen at once, not hours into a calibration."""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from . import experts
from .errors import UserError, one_line
from .families import UNITS, Family, experts_of, family_of, packed_rows, projection_sizes

ROTARY = ".rotary_emb."  # in the names of tensors that are no weights
FLOATS = ("F64", "F32", "F16", "BF16")


def require_whole(
    path: Path, config: PretrainedConfig, shards: dict[str, str], own_name: Callable[[str], str | None] | None = None
) -> None:
    """Opens every shard's header, and holds its tensors against the configuration.

    Args:
        path: the checkpoint's folder.
        config: its configuration.
        shards: tensor name -> file name.
        own_name: tells a tensor's name from the one that it has in the files, None where it is of no interest.

    Raises:
        UserError: a shard is damaged, or a tensor missing, of another shape, or of a layer too many; there is no language model.
    """
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for shard in sorted(set(shards.values())):
        try:
            with safe_open(path / shard, "pt") as file:
                names = {name: own_name(name) if own_name else name for name in file.keys()}
                # What an index does not name is not read: to whoever reads by it, it is absent.
                slices = {own: file.get_slice(name) for name, own in names.items() if own in shards}
                shapes |= {name: held.get_shape() for name, held in slices.items()}
                dtypes |= {name: held.get_dtype() for name, held in slices.items()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path / shard} is damaged: {one_line(error)}; download it again") from error
    if absent := sorted(set(shards) - set(shapes)):
        raise UserError(f"{path} names tensors its files do not hold, first '{absent[0]}'; download it again")
    family = family_of(config)
    _require_language_model(path, family, config, shapes)
    for name, shape in _shapes_by_config(config, shards).items():
        if shapes.get(name) != shape:
            raise UserError(f"{path}: tensor '{name}' is {shapes.get(name, 'absent')}; config.json says {shape}")
    _require_layers(path, config, shapes)
    used = (family.embedding, family.head, family.final_norm, f"{family.layers}.")
    for name, dtype in dtypes.items():
        if name.startswith(used) and dtype not in FLOATS:
            raise UserError(f"{path}: tensor '{name}' is {dtype}, not floats: convert the model that it was made from")


def _require_language_model(path: Path, family: Family, config: PretrainedConfig, shapes: dict[str, list[int]]) -> None:
    """Sees that there are an embedding and a head, one for the other where they are tied."""
    if any(name.endswith((".qweight", ".qzeros")) for name in shapes):
        raise UserError(f"{path} holds quantised weights (qweight): convert the model that they were made from")
    if family.final_norm not in shapes and family.final_norm.removeprefix("model.") in shapes:
        raise UserError(f"{path} holds a decoder without its head: save and convert the whole ...ForCausalLM model")
    ends = {family.embedding, family.head} & set(shapes)
    if not ends:
        raise UserError(f"{path} has neither '{family.embedding}' nor '{family.head}'")
    if len(ends) == 1 and not config.tie_word_embeddings:
        (absent,) = {family.embedding, family.head} - ends
        raise UserError(
            f"{path} has no '{absent}', and config.json does not tie embedding and head (tie_word_embeddings): it is not a whole "
            f"language model ({', '.join(config.architectures or ['of unknown class'])})"
        )


def _require_layers(path: Path, config: PretrainedConfig, shapes: dict[str, list[int]]) -> None:
    """Sees that there are as many layers as the configuration says, and that all hold the same."""
    layers: dict[str, set[str]] = {str(index): set() for index in range(config.num_hidden_layers)}
    first: dict[str, tuple[str, list[int]]] = {}
    prefix = f"{family_of(config).layers}."
    for name, shape in shapes.items():
        layer, _, inside = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and ROTARY not in name:
            if layer not in layers:
                raise UserError(f"{path} has a tensor '{name}'; config.json says that there are {len(layers)} layers")
            layers[layer].add(inside)
            other, expected = first.setdefault(inside, (name, shape))
            if shape != expected:
                raise UserError(f"{path}: tensor '{name}' is {shape}, '{other}' {expected}: download it again")
    everything = set().union(*layers.values())
    for layer, held in layers.items():
        if absent := sorted(everything - held):
            raise UserError(f"{path} lacks '{prefix}{layer}.{absent[0]}', which other layers have: download it again")


def _shapes_by_config(config: PretrainedConfig, shards: dict[str, str]) -> dict[str, list[int]]:
    """Returns what some tensors must be if configuration and weights belong together: of the last layer, and both ends."""
    family = family_of(config)
    last, sizes = f"{family.layers}.{config.num_hidden_layers - 1}", projection_sizes(config)
    shapes = {family.final_norm: [config.hidden_size]}
    ends = (name for name in (family.embedding, family.head) if name in shards)
    shapes |= {name: [config.vocab_size, config.hidden_size] for name in ends}
    mixture = experts_of(config)
    units = UNITS if mixture is None else ("attention",)
    if mixture is not None:
        inside = f"{last}.{family.mlp.module}"
        shapes[f"{inside}.gate.weight"] = [mixture.count, config.hidden_size]
        if f"{inside}.{family.mlp.experts}.{experts.PACKED}" not in shards:
            name = f"{inside}.{family.mlp.experts}.{mixture.count - 1}.up_proj.weight"
            shapes[name] = [mixture.width, config.hidden_size]
    for unit in units:
        places = family.unit(unit)
        for projection in places.kept + places.skipped:
            tensor, rows = packed_rows(config, unit, projection)
            within = (projection,) if rows is None else places.packed[tensor]
            outputs = sum(sizes[name][1] for name in within)
            shapes[f"{last}.{places.module}.{tensor}.weight"] = [outputs, sizes[projection][0]]
    return shapes
