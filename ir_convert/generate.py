"""Continues a prompt with either artifact."""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from threading import Thread

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .errors import UserError, one_line
from .files import expanded, onnx_files

CONTEXT = 8  # tokens that the next are decoded with
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
LEAST_TEMPERATURE = 1e-3  # below it half precision overflows


def generate(
    artifact: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sparsity: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generator[str, None, None]:
    """Yields the prompt's continuation piece by piece.

    Args:
        artifact: an ``.onnx`` file or a checkpoint folder that ir-convert wrote.
        prompt: text.
        max_new_tokens: at most so many.
        sparsity: share of FLOPs to save; None for the artifact's own.
        temperature: 0 for greedy decoding.
        seed: of sampling.

    Raises:
        UserError: the artifact is missing or not one of ours, the prompt is empty, the sparsity is out of reach, or
            the temperature is out of its range.
    """
    artifact = expanded(artifact)
    if not artifact.exists():
        raise UserError(f"artifact '{artifact}' does not exist: name an .onnx file or a checkpoint folder")
    if not prompt:
        raise UserError("the prompt is empty: give some text to continue")
    if temperature and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise UserError(
            f"temperature {temperature:g} is not in [{LEAST_TEMPERATURE:g}, inf): give 0 for greedy decoding"
        )
    if artifact.is_dir() and not onnx_files(artifact):
        return _hugging_face(artifact, prompt, max_new_tokens, sparsity, temperature, seed)
    return _onnx(artifact, prompt, max_new_tokens, sparsity, temperature, seed)


def _onnx(
    path: Path, prompt: str, max_new_tokens: int, sparsity: float | None, temperature: float, seed: int
) -> Generator[str, None, None]:
    from .runtime import OnnxModel

    model = OnnxModel.load(path, sparsity=sparsity)
    ids = model.tokenizer(prompt)["input_ids"]
    steps = model.generate(np.array([ids]), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return _pieces(model.tokenizer, ids, (int(step[0]) for step in steps))


def _hugging_face(
    folder: Path, prompt: str, max_new_tokens: int, sparsity: float | None, temperature: float, seed: int
) -> Generator[str, None, None]:
    from .export import hf

    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = hf.load(folder).to(device).eval()
        tokenizer = hf.load_tokenizer(folder, model)
    except UserError:
        raise
    except Exception as error:  # a missing, damaged or foreign file, each with an exception of its own
        raise UserError(f"the checkpoint in {folder} does not load: {one_line(error)}") from error
    if sparsity is not None:
        try:
            model.set_sparsity(sparsity)
        except ValueError as error:
            raise UserError(str(error)) from error
    torch.manual_seed(seed)
    # The base model's own settings (beams, penalties, top_k) stay out of it, but for its special tokens: as with an ONNX file.
    tokens = {name: getattr(model.generation_config, name) for name in SPECIAL}
    model.generation_config = GenerationConfig(**tokens)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    streamer = _Tokens()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
        except _UnheardError:
            pass
        except BaseException as error:
            failures.append(error)
            streamer.end()

    def stream() -> Generator[str, None, None]:
        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from _pieces(tokenizer, inputs["input_ids"][0].tolist(), streamer)
        finally:  # also where the caller wants no more: torch must not be at work when the process ends
            streamer.stopped = True
            thread.join()
        if failures:
            raise failures[0]

    return stream()


class _UnheardError(Exception):
    """Ends a generation whose tokens nobody takes any more."""


class _Tokens(BaseStreamer):
    """The tokens that ``generate`` chooses, one by one, in another thread."""

    def __init__(self) -> None:
        self._queue: Queue[int | None] = Queue()
        self._prompt, self.stopped = True, False

    def put(self, value: torch.Tensor) -> None:
        if self.stopped:
            raise _UnheardError
        if not self._prompt:  # which comes first
            for token in value.flatten().tolist():
                self._queue.put(token)
        self._prompt = False

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self._queue.get()) is not None:
            yield token


def _pieces(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Iterable[int]
) -> Generator[str, None, None]:
    """Decodes a stream of tokens as what follows a prompt; a character that spans tokens waits until it is whole."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def last(ids: list[int]) -> list[int]:
        """The last few, or as many more as it takes that no character is cut in two where they begin."""
        count = CONTEXT
        while count < len(ids) and "\ufffd" in decode(ids[-count:]):
            count *= 2
        return ids[-count:]

    seen = last(list(prompt))  # decoded alone, a first token may lose its space
    shown = decode(seen)
    for token in ids:
        seen.append(token)
        text = decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            seen = last(seen)  # or each token would take longer than the one before
            shown = decode(seen)
    yield decode(seen)[len(shown) :]
