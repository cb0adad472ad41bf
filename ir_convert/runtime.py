"""Runs an exported model with ONNX Runtime: logits, generation, and the dial between quality and speed.

model = OnnxModel.load("ir-llama.onnx")
model.set_sparsity(0.3)
for token in model.generate(model.tokenizer("Once upon", return_tensors="np").input_ids, max_new_tokens=20):
    print(model.tokenizer.decode(token), end="")
"""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .checkpoint import TOKENIZER_FILES
from .errors import UserError
from .routing import Curve

if TYPE_CHECKING:
    from .export.hf.control_ir import SparsityControl

Cache = list[NDArray]
_ERRORS_ONLY = 3


@dataclass
class OnnxModel:
    """A routed model in an ONNX Runtime session.

    Attributes:
        path: the model file; tokenizer and configuration lie beside it.
        session: the session.
        metadata: what the model says about itself; see ``ir_convert.export.onnx.graph.metadata``.
        threshold: a unit executes a token whose score is above it; -inf is the dense model.
        saved: the share of FLOPs that the last call saved on its real tokens, forecasters and routers paid for.
    """

    path: Path
    session: ort.InferenceSession = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)
    threshold: float
    saved: float = 0.0
    _control: "SparsityControl | None" = field(default=None, repr=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        sparsity: float | None = None,
        threshold: float | None = None,
        options: ort.SessionOptions | None = None,
    ) -> "OnnxModel":
        """Loads a model file, or the one model file of a folder.

        Args:
            path: the model.
            providers: execution providers, best first; by default CUDA where there is a GPU, and the CPU.
            threads: threads of one operator; by default onnxruntime's choice.
            sparsity: share of FLOPs to save instead of the one the model was made for.
            threshold: or the threshold itself.
            options: session options to start from, e.g. with a custom-op library registered.

        Raises:
            UserError: missing, damaged, not an ir-convert model, or a sparsity out of reach.
        """
        path = _model_file(Path(path))
        metadata = _inspect(path)
        options = options or ort.SessionOptions()
        if options.log_severity_level < 0:  # untouched; the optional input would draw a warning from every load
            options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = ort.InferenceSession(str(path), options, providers=providers or _providers())
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise UserError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error
        model = cls(path, session, metadata, float(metadata["threshold"]))
        if sparsity is not None:
            model.set_sparsity(sparsity)
        if threshold is not None:
            model.threshold = threshold
        return model

    @property
    def curve(self) -> Curve:
        """Sparsity against threshold, as measured when the model was calibrated."""
        return Curve(**self.metadata["sparsity_curve"])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer from the model's folder."""
        if not any(self.path.with_name(name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"no tokenizer lies beside {self.path}: copy the base model's tokenizer files there")
        try:
            return AutoTokenizer.from_pretrained(self.path.parent)
        except (OSError, ValueError) as error:
            raise UserError(f"the tokenizer beside {self.path} does not load: {str(error).splitlines()[0]}") from error

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text, by the configuration files beside the model."""
        for name in ("generation_config.json", "config.json"):
            file = self.path.with_name(name)
            ids = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
            if ids is not None:
                return frozenset([ids] if isinstance(ids, int) else ids)
        return frozenset()

    def set_sparsity(self, sparsity: float) -> None:
        """Sets the share of FLOPs to save; 0 is the dense model."""
        self.threshold = self.curve.at(sparsity)

    @contextmanager
    def hold_sparsity(self, sparsity: float, **gain: float) -> Iterator["SparsityControl"]:
        """Inside a ``with`` block, moves the threshold as text drifts, so that what is saved stays at ``sparsity``.

        Args:
            sparsity: the share of FLOPs to save.
            **gain: how far the threshold moves for each unit of sparsity missed over 256 tokens; 2.0 by default.
        """
        from .export.hf.control_ir import SparsityControl  # its package imports the models of transformers

        before = self.threshold, self._control
        self.set_sparsity(sparsity)
        self._control = SparsityControl(sparsity, self.threshold, **gain)
        try:
            yield self._control
        finally:
            self.threshold, self._control = before

    def logits(
        self,
        input_ids: NDArray,
        attention_mask: NDArray | None = None,
        position_ids: NDArray | None = None,
        past: Cache | None = None,
    ) -> NDArray:
        """Returns the logits ``[B, S, vocab]``; see ``forward``."""
        return self.forward(input_ids, attention_mask, position_ids, past)[0]

    def forward(
        self,
        input_ids: NDArray,
        attention_mask: NDArray | None = None,
        position_ids: NDArray | None = None,
        past: Cache | None = None,
    ) -> tuple[NDArray, Cache]:
        """Runs S new tokens of each of B sequences, after P cached ones.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, P + S]``, 0 where there is padding, left or right; by default none.
            position_ids: ``[B, S]``; by default each token's count of real tokens before it.
            past: keys and values of the cached tokens, as returned by the call before.

        Returns:
            Logits ``[B, S, vocab]``, and the keys and values of all P + S tokens.
        """
        input_ids = np.asarray(input_ids, np.int64)
        batch, length = input_ids.shape
        past = past or self._empty_cache(batch)
        if attention_mask is None:
            attention_mask = np.ones((batch, past[0].shape[2] + length))
        attention_mask = np.asarray(attention_mask, np.int64)
        if position_ids is None:
            position_ids = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -length:]
        feed = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": np.asarray(position_ids, np.int64),
            "routing_threshold": np.array([self.threshold], np.float32),
        }
        feed |= dict(zip((value.name for value in self._past_inputs), past, strict=True))
        logits, *present = self.session.run(None, feed)
        self.saved = float(present.pop(len(past))[0])
        if self._control is not None:
            self.threshold = self._control.observe(self.saved, int(attention_mask[:, -length:].sum()))
        return logits, present

    def generate(
        self,
        input_ids: NDArray,
        attention_mask: NDArray | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_ids: Collection[int] | None = None,
    ) -> Iterator[NDArray]:
        """Continues B texts, a token at a time.

        Args:
            input_ids: the prompts ``[B, S]``, padded on the left where they differ in length.
            attention_mask: ``[B, S]``, 0 where there is padding.
            max_new_tokens: where to stop at the latest.
            temperature: 0 takes the likeliest token.
            top_k: sample from this many likeliest tokens.
            top_p: sample from the likeliest tokens that together have this probability.
            seed: of the sampling.
            eos_ids: tokens that end a text; by default those of the model's configuration.

        Yields:
            The next token of every text, int64 ``[B]``; one that has ended repeats its last token.
        """
        tokens = np.asarray(input_ids, np.int64)
        mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask, np.int64)
        if not mask[:, -1].all():
            raise UserError("generate() wants prompts padded on the left, so that every prompt's last token comes last")
        ends = np.array(sorted(self.eos_ids if eos_ids is None else eos_ids), np.int64)
        generator = np.random.default_rng(seed)
        ended = np.zeros(len(tokens), bool)
        cache: Cache | None = None
        for _ in range(max_new_tokens):
            logits, cache = self.forward(tokens, mask, past=cache)
            choice = _choose(logits[:, -1].astype(np.float32), temperature, top_k, top_p, generator)
            tokens = np.where(ended, tokens[:, -1], choice)[:, None]
            yield tokens[:, 0]
            ended |= np.isin(tokens[:, 0], ends)
            if ended.all():
                return
            # From here on, what a text that has ended is fed counts as padding: nothing executes for it.
            mask = np.concatenate([mask, ~ended[:, None]], axis=1).astype(np.int64)

    @cached_property
    def _past_inputs(self) -> list[ort.NodeArg]:
        return [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]

    def _empty_cache(self, batch: int) -> Cache:
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return [
            np.zeros((batch, *value.shape[1:2], 0, value.shape[3]), dtypes[value.type]) for value in self._past_inputs
        ]


def _choose(
    logits: NDArray, temperature: float, top_k: int | None, top_p: float | None, generator: np.random.Generator
) -> NDArray:
    """Chooses a token for every row of ``logits[B, vocab]``."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    scaled = np.take_along_axis(logits, order, axis=-1) / temperature
    p = np.exp(scaled - scaled[:, :1], dtype=np.float64)
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None:
        p[np.cumsum(p, axis=-1) - p >= top_p] = 0  # keeps the token that crosses the line
        p /= p.sum(axis=-1, keepdims=True)
    draws = generator.random((len(p), 1))
    picked = np.minimum((np.cumsum(p, axis=-1) <= draws).sum(axis=-1), (p > 0).sum(axis=-1) - 1)
    return np.take_along_axis(order, picked[:, None], axis=-1)[:, 0]


def _providers() -> list[str]:
    wanted = ["CUDAExecutionProvider"] * torch.cuda.is_available() + ["CPUExecutionProvider"]
    return [provider for provider in wanted if provider in ort.get_available_providers()]


def _model_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.onnx"))
        if len(files) != 1:
            raise UserError(f"{path} holds {len(files)} .onnx files: name the one to load")
        return files[0]
    if not path.is_file():
        raise UserError(f"model file '{path}' does not exist")
    return path


def _inspect(path: Path) -> dict[str, Any]:
    """Reads the model's metadata, and checks that its weights are there, without reading them."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file, or is damaged") from error
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    if "ir_convert" not in properties:
        raise UserError(f"{path} was not written by ir-convert: it has no routing to set")
    for tensor in proto.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if not where:
            continue
        data = path.parent / where["location"]
        if not data.is_file():
            raise UserError(f"{path} needs its weights '{where['location']}' beside it: copy both files together")
        if data.stat().st_size < int(where.get("offset", 0)) + int(where.get("length", 0)):
            raise UserError(f"{data} is shorter than {path.name} says: copy both files together again")
    return json.loads(properties["ir_convert"])
