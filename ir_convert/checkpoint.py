"""The base model on disk: configuration, tokenizer and weights, read a tensor at a time.

Nothing here runs code that came with a model, and nothing loads a whole model.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from . import experts, rope, wrapper
from .errors import UserError, one_line
from .families import UNITS, Family, family_of, projection_sizes
from .files import TEMPLATES, TOKENIZER_FILES, expanded
from .integrity import ROTARY, require_whole
from .model_folder import ADAPTER, download, shards_of, why_no_config
from .supported import require_supported

COPIED = ("generation_config.json", *TOKENIZER_FILES, TEMPLATES)  # from the base model to what is written

# Low-rank changes by weight name: A ``[rank, in]`` and B ``[out, rank]``; the changed weight is W + B A.
Lora = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Rounding(Protocol):
    """Rounds weights to what a quantised format can hold."""

    def __call__(self, weight: torch.Tensor, name: str | None) -> torch.Tensor:
        """Returns a Linear's weight ``[out, in]`` as it comes back from the format, fp32.

        Args:
            name: stands for this very weight, which is therefore rounded once; None where it may change.
        """

    def facts(self) -> dict[str, Any]:
        """Returns what decides the rounded weights, for metadata."""


@dataclass
class Checkpoint:
    """A local checkpoint folder, its headers checked.

    Attributes:
        name: what the user called it: a folder or a Hub id.
        path: the local folder.
        config: the model's configuration.
        shards: tensor name -> file name.
        lora: low-rank changes that reading folds into the weights; see ``Routing.lora``.
        rounding: what then quantises the units' projections, and gives them back as they are after it; None for none.
        inside: what the files call the tensors, where that is not what the model does: in a multimodal checkpoint, of which
            this is the language model, and in Mixtral's.
        wrapped: whether it is the language model of a multimodal checkpoint.
    """

    name: str
    path: Path
    config: PretrainedConfig
    shards: dict[str, str] = field(repr=False)
    lora: Lora = field(default_factory=dict, repr=False)
    rounding: Rounding | None = field(default=None, repr=False)
    inside: dict[str, str] = field(default_factory=dict, repr=False)
    wrapped: bool = False

    @classmethod
    def open(cls, model: str) -> "Checkpoint":
        """Opens a local folder or a Hub id (downloaded to the Hub's cache); of a multimodal model, its language model.

        Raises:
            UserError: not found, no safetensors weights, not supported, damaged or missing shards.
        """
        path = expanded(Path(model))
        path = path if path.is_dir() else download(model)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # what transformers and its validators raise shares no base class
            raise UserError(why_no_config(path, error)) from error
        kind, text = config.model_type, wrapper.language_model(config)
        config = text or config
        rope.read_as_version_5(config)
        experts.read_as_version_5(config)
        if config.model_type == "gemma" and config.hidden_act == "gelu":
            config.hidden_act = "gelu_pytorch_tanh"  # which the name stood for; transformers 5 reads it so
        require_supported(config)
        if (path / ADAPTER).is_file():  # transformers would load it, too
            raise UserError(
                f"{path} holds an adapter beside its model: merge them, or move {ADAPTER} away to do without it"
            )
        own_name = _own_name(text is not None, config.model_type)
        shards, inside = shards_of(path), {}
        if own_name is not None:
            inside = {own: name for name in shards if (own := own_name(name))}
            if not inside:
                first = next(iter(shards), "none")
                raise UserError(f"{path}: a model of type '{kind}' whose tensors have unknown names, first '{first}'")
            shards = {own: shards[name] for own, name in inside.items()}
        require_whole(path, config, shards, own_name)
        # Old checkpoints store the frequencies of rotary embeddings; models compute them.
        shards = {name: shard for name, shard in shards.items() if ROTARY not in name}
        checkpoint = cls(model, path, config, shards, inside=inside, wrapped=text is not None)
        if checkpoint._has_two_heads():
            config.tie_word_embeddings = False
        return checkpoint

    @property
    def hub_id(self) -> str | None:
        """Returns the name where it is a Hub id."""
        return self.name if re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and not Path(self.name).exists() else None

    @property
    def public_name(self) -> str:
        """Returns what files that are passed on call it: where a local folder lies is nobody else's business."""
        return self.hub_id or self.path.resolve().name

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # transformers 4 lets an AttributeError through, tokenizers raise a bare Exception
            raise UserError(f"{self.name} has no tokenizer that loads: {one_line(error)}") from error

    @cached_property
    def vocabulary(self) -> torch.Tensor:
        """Ids ``[tokens]`` of the tokens that text consists of: not special ones, nor rows that the tokenizer does not use.

        All of them where there is no tokenizer. (transformers makes an empty one of some configurations.)
        """
        every = torch.arange(self.config.vocab_size)
        try:
            tokenizer = self.tokenizer
        except UserError:
            return every
        added = tokenizer.added_tokens_decoder.items()
        special = [token for token, text in added if text.special] + tokenizer.all_special_ids
        text = every[: len(tokenizer)]
        text = text[~torch.isin(text, torch.tensor(special, dtype=torch.long))]
        return text if len(text) else every

    @property
    def written_config(self) -> dict[str, Any]:
        """The configuration as its author wrote it; of a language model in a multimodal one, as transformers writes it."""
        if self.wrapped:
            return json.loads(self.config.to_json_string(use_diff=False))
        return json.loads((self.path / "config.json").read_text("utf-8"))

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return self.config.tie_word_embeddings

    def _has_two_heads(self) -> bool:
        """Whether a head is stored that is not the embedding that it is said to be tied to: transformers 5 does not tie it then."""
        ends = self.family.embedding, self.family.head
        if not self.config.tie_word_embeddings or not all(name in self.shards for name in ends):
            return False
        return not torch.equal(*(self.read(name) for name in ends))

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Reads one tensor; either of a tied pair stands for the other."""
        if name not in self.shards and self.tied:
            twins = {self.family.embedding: self.family.head, self.family.head: self.family.embedding}
            name = twins.get(name, name)
        if name not in self.shards:
            raise UserError(f"{self.name} has no tensor '{name}'")
        with safe_open(self.path / self.shards[name], "pt") as file:
            tensor = file.get_tensor(self.inside.get(name, name))
        if name in self.lora:
            a, b = self.lora[name]
            tensor = (tensor.float() + b @ a).to(tensor.dtype)
        dtype = dtype or tensor.dtype
        return self._rounded(name, tensor).to(dtype)

    def read_layer(self, layer: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Reads one decoder layer's tensors, by their names inside the layer."""
        prefix = f"{self.family.layers}.{layer}."
        return {name.removeprefix(prefix): self.read(name, dtype) for name in self.shards if name.startswith(prefix)}

    def with_lora(self, lora: Lora) -> "Checkpoint":
        """Returns the checkpoint with these changes folded into whatever is read."""
        return self._with(lora=lora)

    def quantised(self, rounding: Rounding) -> "Checkpoint":
        """Returns the checkpoint with the units' projections read as quantised and dequantised.

        All else stays what it is: embedding, head, norms, biases, and the scores that choose experts. Low-rank changes are
        folded in first.
        """
        return self._with(rounding=rounding)

    def _with(self, **changes: Any) -> "Checkpoint":
        """Returns a changed view; the files are the same, so what is known of them need not be found out again."""
        view = replace(self, **changes)
        known = ("weights_sha256", "weight_bytes", "stored_dtype", "tokenizer")
        view.__dict__.update({name: self.__dict__[name] for name in known if name in self.__dict__})
        return view

    def _rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self.rounding is None or (parts := self._projections(name, tensor)) is None:
            return tensor
        known = name not in self.lora
        rounded = [self.rounding(part, f"{name}.{index}" if known else None) for index, part in enumerate(parts)]
        return (torch.stack(rounded) if tensor.ndim == 3 else torch.cat(rounded)).reshape(tensor.shape)

    def _projections(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Returns the matrices ``[out, in]`` that a tensor of a unit holds, each a Linear's weight; None for another tensor."""
        for unit in UNITS:
            place = self.family.unit(unit)
            inside = name.partition(f".{place.module}.")[2]
            if not name.startswith(f"{self.family.layers}.") or not inside or tensor.ndim < 2:
                continue
            if place.experts is not None and inside == "gate.weight":
                return None
            if tensor.ndim == 3:  # a stack of experts
                return list(tensor)
            sizes = projection_sizes(self.config)
            packed = place.packed.get(inside.removesuffix(".weight"))
            return list(tensor.split([sizes[part][1] for part in packed])) if packed else [tensor]
        return None

    def files(self, names: Iterable[str]) -> list[Path]:
        """Returns those of the named files that the folder has."""
        return [self.path / name for name in names if (self.path / name).is_file()]

    @property
    def copied(self) -> list[str]:
        """The names of those files of ``COPIED`` that the folder has."""
        templates = sorted((self.path / TEMPLATES).glob("*.jinja"))
        files = [*self.files(COPIED), *(file for file in templates if file.is_file())]
        return [file.relative_to(self.path).as_posix() for file in files]

    def copy_to(self, folder: Path) -> None:
        """Copies them into another folder."""
        for name in self.copied:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.path / name, folder / name)

    def sha256(self, names: Iterable[str]) -> str:
        """SHA-256 over those of the named files that the folder has, in the order of their names."""
        digest = hashlib.sha256()
        for path in self.files(sorted(names)):
            with open(path, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 over the weight files, in the order of their names."""
        return self.sha256(set(self.shards.values()))

    @cached_property
    def weight_bytes(self) -> int:
        """About how many bytes the weights take; what lies beside a language model in a multimodal checkpoint is left out."""
        if self.inside:
            return sum(math.prod(shape) for shape in self._shapes()) * self.stored_dtype.itemsize
        return sum((self.path / shard).stat().st_size for shard in set(self.shards.values()))

    def _shapes(self) -> Iterator[list[int]]:
        for shard in set(self.shards.values()):
            with safe_open(self.path / shard, "pt") as file:
                for name in (name for name, where in self.shards.items() if where == shard):
                    yield file.get_slice(self.inside.get(name, name)).get_shape()

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The precision of the weights as stored (of one projection, which stands for all)."""
        return self.read(f"{self.family.layers}.0.{self.family.attention.module}.o_proj.weight").dtype


def _own_name(wrapped: bool, model_type: str) -> Callable[[str], str | None] | None:
    """Returns what gives a tensor's name in the model from that in the files, None for one of another part; None for no such."""
    if not wrapped:
        return experts.own_name if model_type == "mixtral" else None
    if model_type != "mixtral":
        return wrapper.own_name

    def own_name(name: str) -> str | None:
        own = wrapper.own_name(name)
        return None if own is None else experts.own_name(own)

    return own_name
