"""A routed model in an ONNX Runtime session."""

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..curve import Curve
from ..errors import UserError, one_line
from ..export.hf.control_ir import SparsityControl
from ..files import TOKENIZER_FILES
from .buffers import Buffers
from .checks import ends_of, mask_of, require_cache, require_count, require_positions, require_sampling, tokens_of
from .dtypes import NUMPY
from .library import choose as choose_library
from .loading import choose_providers, end_tokens, inspect, model_file, open_session, warn_if_slow
from .sampling import choose, require_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cache = list[NDArray]
_ERRORS_ONLY = 3


@dataclass
class OnnxModel:
    """A routed model in an ONNX Runtime session.

    Attributes:
        path: the model file; tokenizer and configuration lie beside it.
        session: the session.
        metadata: what the model says about itself; see ``ir_convert.export.onnx.metadata``.
        threshold: a unit executes a token whose score is above it; -inf is the dense model.
        saved: the share of FLOPs that the last call saved on its real tokens, forecasters and routers paid for.
        executed: which tokens the last call's units executed, bool ``[layers, 2, B, S]`` (attention, MLP); None for a model
            that was made without ``--trace``.
        library: the library whose native kernels run the units; None where the model's own functions do.
    """

    path: Path
    session: ort.InferenceSession = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)
    threshold: float
    saved: float = 0.0
    executed: NDArray | None = field(default=None, repr=False)
    library: Path | None = None
    _control: SparsityControl | None = field(default=None, repr=False)

    @classmethod
    def load(
        cls,
        path: str | Path,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        sparsity: float | None = None,
        threshold: float | None = None,
        options: ort.SessionOptions | None = None,
        library: str | Path | bool | None = None,
    ) -> "OnnxModel":
        """Loads a model file, or the one model file of a folder.

        Args:
            path: the model.
            providers: execution providers by name, best first; by default CUDA where there is a GPU, and the CPU.
            threads: threads of one operator; by default onnxruntime's choice.
            sparsity: share of FLOPs to save instead of the one the model was made for.
            threshold: the threshold itself, in place of a sparsity.
            options: session options to start from. The load sets what else is asked for in them, native kernels as well: where
                it uses a library, they serve this load alone.
            library: native kernels for the units: by default those that were built on this machine
                (``ir_convert.export.onnx.ops``), where they can run the model; False for none, a path for another library.

        Raises:
            UserError: missing, damaged, not an ir-convert model, a sparsity out of reach or a threshold beside it, or options that
                hold native kernels.
        """
        if sparsity is not None and threshold is not None:
            raise UserError(f"sparsity {sparsity:g} and threshold {threshold:g} are given: one decides the other")
        if threshold is not None and math.isnan(threshold):
            raise UserError("the threshold is NaN: give a number, -inf for the dense model")
        path = model_file(Path(path).absolute())  # what lies beside it is read when it is asked for
        model_says = inspect(path)
        wanted = choose_providers(providers, path, model_says)
        asked, library = library, choose_library(library, model_says, wanted)
        given, options = options is not None, options or ort.SessionOptions()
        if options.log_severity_level < 0:  # untouched; the optional input would draw a warning from every load
            options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        session = open_session(path, options, wanted, library)
        if wanted[0] not in session.get_providers():  # ONNX Runtime prints why, and goes on without it
            said = f"{wanted[0]} does not start here, for want of what ONNX Runtime has just named"
            if providers is not None or given:  # the caller's choice, or options that cannot serve a second load
                raise UserError(f"{said}: install that, or give providers=['CPUExecutionProvider']")
            warnings.warn(f"{said}: the model runs on the CPU", stacklevel=2)
            return cls.load(path, ["CPUExecutionProvider"], threads, sparsity, threshold, None, asked)
        warn_if_slow(model_says, wanted, library)
        metadata = model_says.metadata
        model = cls(path, session, metadata, float(metadata["threshold"]), library=library)
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
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer from the model's folder. Imports transformers, and torch with it, which all else here does without."""
        if not any(self.path.with_name(name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"no tokenizer lies beside {self.path}: copy the base model's tokenizer files there")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path.parent, trust_remote_code=False)
        except Exception as error:  # tokenizers' exceptions share no base class of their own
            raise UserError(f"the tokenizer beside {self.path} does not load: {one_line(error)}") from error
        if tokenizer.pad_token is None:  # as Llama 3's; any will do, for masks say where padding is
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text, by the configuration files beside the model; none, with a warning, without them."""
        return end_tokens(self.path)

    def set_sparsity(self, sparsity: float) -> None:
        """Sets the share of FLOPs to save; 0 is the dense model. Raises UserError where that is out of reach."""
        self.threshold = self.curve.at(sparsity)
        if self._control is not None:  # what is held from now on
            self._control.start(sparsity, self.threshold)

    @contextmanager
    def hold_sparsity(self, sparsity: float, **gain: float) -> Iterator[SparsityControl]:
        """Inside a ``with`` block, moves the threshold as text drifts, so that what is saved stays at ``sparsity``.

        It moves by a step every 256 tokens. Blocks may nest; threads that hold different shares want a model each.

        Args:
            sparsity: the share of FLOPs to save.
            **gain: how far the threshold moves for each unit of sparsity missed over 256 tokens; 2.0 by default.

        Raises:
            UserError: the sparsity is out of reach.
            ValueError: a gain that is not positive.
        """
        before = self.threshold, self._control
        control = SparsityControl(sparsity, self.curve.at(sparsity), **gain)
        self.threshold, self._control = control.threshold, control
        try:
            yield control
        finally:
            self.threshold, self._control = before

    def logits(
        self,
        input_ids: NDArray,
        attention_mask: NDArray | None = None,
        position_ids: NDArray | None = None,
        past: Cache | None = None,
    ) -> NDArray:
        """Returns the logits; see ``forward``."""
        return self.forward(input_ids, attention_mask, position_ids, past)[0]

    def forward(
        self,
        input_ids: NDArray,
        attention_mask: NDArray | None = None,
        position_ids: NDArray | None = None,
        past: Cache | None = None,
    ) -> tuple[NDArray, Cache]:
        """Runs S new tokens of each of B sequences, after P cached ones.

        In a model that has a bound (``metadata["long_text_bound"]``: Phi-3 with longrope) a text that grows past so many tokens
        has other rotary frequencies from there on, and what is cached no longer fits: run it all again, without ``past``.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, P + S]``, 0 where there is padding, left or right; by default none.
            position_ids: ``[B, S]``; by default each token's count of real tokens before it.
            past: keys and values of the cached tokens, as returned by the call before.

        Returns:
            Logits ``[B, S, vocab]``, of a model made with ``--logits last`` ``[B, 1, vocab]``, and the keys and values of all
            P + S tokens.

        Raises:
            UserError: an argument has another shape, or keys and values are bfloat16, for which numpy has no type.
        """
        if self._past_inputs[0].type not in NUMPY:
            raise UserError(f"keys and values of {self.path} are bfloat16, which numpy has not: use generate()")
        input_ids = tokens_of(input_ids, self._vocabulary)
        batch, length = input_ids.shape
        if not length:
            raise UserError(f"input_ids {list(input_ids.shape)} hold no token: give at least one of every text")
        past = self._empty_cache(batch) if past is None or not len(past) else past
        require_cache(past, self._past_inputs, batch)
        require_positions(position_ids, input_ids.shape)
        mask = mask_of(attention_mask, batch, past[0].shape[2] + length)
        feed = self._feed(input_ids, mask, position_ids)
        feed |= dict(zip((value.name for value in self._past_inputs), past, strict=True))
        names = [value.name for value in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(None, feed), strict=True))
        self._observe(outputs, feed)
        return outputs["logits"], [outputs[name] for name in names if name.startswith("present.")]

    def _feed(
        self, input_ids: NDArray, attention_mask: NDArray, position_ids: NDArray | None = None
    ) -> dict[str, NDArray]:
        """Returns all inputs but the cache."""
        if position_ids is None:
            position_ids = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -input_ids.shape[1] :]
        return {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "attention_mask": np.ascontiguousarray(attention_mask),
            "position_ids": np.ascontiguousarray(position_ids, np.int64),
            "routing_threshold": np.array([self.threshold], np.float32),
        }

    def _observe(self, outputs: dict[str, NDArray], feed: dict[str, NDArray]) -> None:
        """Takes note of what a call did, and moves the threshold if the sparsity is held."""
        self.saved, self.executed = float(outputs["routing_saved"][0]), outputs.get("executed")
        if self._control is not None:
            if self.threshold != self._control.threshold:  # the caller has put it elsewhere
                self._control.start(self._control.sparsity, self.threshold)
            real = feed["attention_mask"][:, -feed["input_ids"].shape[1] :]
            self.threshold = self._control.observe(self.saved, int(real.sum()))

    def generate(
        self,
        input_ids: NDArray,
        attention_mask: NDArray | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_ids: Collection[int] | int | None = None,
        chunk_size: int = 1024,
    ) -> Iterator[NDArray]:
        """Continues B texts, a token at a time; keys and values stay where they are, in buffers of the longest text's length.

        Where one grows past the bound from which on its rotary frequencies are others, all is run once more (see ``forward``).

        Args:
            input_ids: the prompts ``[B, S]``, padded on the left where they differ in length.
            attention_mask: ``[B, S]``, 0 where there is padding.
            max_new_tokens: where to stop at the latest.
            temperature: 0 takes the likeliest token.
            top_k: sample from this many likeliest tokens.
            top_p: sample from the likeliest tokens that together have this probability.
            seed: of the sampling.
            eos_ids: tokens (or one token) that end a text; by default those of the model's configuration.
            chunk_size: a longer prompt is run in chunks of so many tokens, as logits and masks of all at once would take memory
                that grows with its length, and its square; but for one beyond the bound.

        Yields:
            The next token of every text, int64 ``[B]``; one that has ended repeats its last token.
        """
        require_sampling(temperature, top_k, top_p, seed)
        require_count("max_new_tokens", max_new_tokens, "how many tokens to write at the most", 0)
        require_count("chunk_size", chunk_size, "how many of the prompt's tokens to run at once", 1)
        text = tokens = tokens_of(input_ids, self._vocabulary)
        mask = mask_of(attention_mask, *tokens.shape)
        if not tokens.size:
            raise UserError(f"generate() wants prompts of at least one token, got shape {list(tokens.shape)}")
        if not mask[:, -1].all():
            raise UserError("generate() wants prompts padded on the left, so that every prompt's last token comes last")
        ends = ends_of(self.eos_ids if eos_ids is None else eos_ids)
        generator = np.random.default_rng(seed)
        ended = np.zeros(len(tokens), bool)
        # The last token is never fed back.
        buffers = Buffers(self.session, len(tokens), tokens.shape[1] + max_new_tokens - 1)
        for _ in range(max_new_tokens):
            feed = self._feed(text if self._passes_bound(mask) else tokens, mask)
            outputs = buffers.run(feed, mask.shape[1] if self._beyond_bound(mask) else chunk_size)
            self._observe(outputs, feed)
            logits = outputs["logits"][:, -1].astype(np.float32)
            require_numbers(logits, ~ended)
            choice = choose(logits, temperature, top_k, top_p, generator)
            tokens = np.where(ended, tokens[:, -1], choice)[:, None]
            yield tokens[:, 0].copy()  # the caller's own
            ended |= np.isin(tokens[:, 0], ends)
            if ended.all():
                return
            # From here on, what a text that has ended is fed counts as padding: nothing executes for it.
            mask = np.concatenate([mask, ~ended[:, None]], axis=1).astype(np.int64)
            text = np.concatenate([text, tokens], axis=1)

    def _passes_bound(self, mask: NDArray) -> bool:
        """Tells whether a text's last token is the first beyond the bound: what is cached of it has other frequencies."""
        bound = self.metadata.get("long_text_bound")
        return bound is not None and bool(((mask.sum(axis=1) == bound + 1) & (mask[:, -1] == 1)).any())

    def _beyond_bound(self, mask: NDArray) -> bool:
        """Tells whether a text is longer than the bound: all of it has the frequencies of long texts, its first chunk as well."""
        bound = self.metadata.get("long_text_bound")
        return bound is not None and int(mask.sum(axis=1).max()) > bound

    @cached_property
    def _vocabulary(self) -> int:
        return next(value.shape[-1] for value in self.session.get_outputs() if value.name == "logits")

    @cached_property
    def _past_inputs(self) -> list[ort.NodeArg]:
        return [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]

    def _empty_cache(self, batch: int) -> Cache:
        return [
            np.zeros((batch, *value.shape[1:2], 0, value.shape[3]), NUMPY[value.type]) for value in self._past_inputs
        ]
