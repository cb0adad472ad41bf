"""Continues a prompt with either artifact."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from .errors import UserError, one_line

LEAST_TEMPERATURE = 1e-3  # below it half precision overflows


def generate(
    artifact: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sparsity: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
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
    if not artifact.exists():
        raise UserError(f"artifact '{artifact}' does not exist: name an .onnx file or a checkpoint folder")
    if not prompt:
        raise UserError("the prompt is empty: give some text to continue")
    if temperature and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise UserError(
            f"temperature {temperature:g} is not in [{LEAST_TEMPERATURE:g}, inf): give 0 for greedy decoding"
        )
    if (artifact / "1" / "model.onnx").is_file():
        artifact = artifact / "1"  # a model of Triton's repository
    if artifact.is_dir() and not any(artifact.glob("*.onnx")):
        return _hugging_face(artifact, prompt, max_new_tokens, sparsity, temperature, seed)
    return _onnx(artifact, prompt, max_new_tokens, sparsity, temperature, seed)


def _onnx(
    path: Path, prompt: str, max_new_tokens: int, sparsity: float | None, temperature: float, seed: int
) -> Iterator[str]:
    from .runtime import OnnxModel

    model = OnnxModel.load(path, sparsity=sparsity)
    ids = np.array([model.tokenizer(prompt)["input_ids"]])
    steps = model.generate(ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return _pieces(model.tokenizer, (int(step[0]) for step in steps))


def _hugging_face(
    folder: Path, prompt: str, max_new_tokens: int, sparsity: float | None, temperature: float, seed: int
) -> Iterator[str]:
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
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
        except BaseException as error:
            failures.append(error)
            streamer.end()

    def stream() -> Iterator[str]:
        thread = Thread(target=run, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]

    return stream()


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """Decodes a stream of tokens; a character that spans tokens waits until it is whole."""
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = str(tokenizer.decode(seen, skip_special_tokens=True))
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield str(tokenizer.decode(seen, skip_special_tokens=True))[len(shown) :]
