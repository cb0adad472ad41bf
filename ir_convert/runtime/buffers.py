"""Keys and values in buffers that the model writes in place: no token copies the cache."""

from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import UserError
from .dtypes import ELEMENTS, device_of


@dataclass
class Buffers:
    """Room for the keys and values of every layer, on the session's device, each buffer past and present at once.

    Attributes:
        session: whose inputs and outputs they are.
        batch: sequences.
        capacity: slots, padding included, for the longest text that will come.
    """

    session: ort.InferenceSession
    batch: int
    capacity: int
    _binding: ort.IOBinding = field(init=False, repr=False)

    def __post_init__(self) -> None:
        device, self._binding = device_of(self.session), self.session.io_binding()
        for past in self.session.get_inputs():
            if past.name.startswith("past_key_values."):
                shape = [self.batch, past.shape[1], self.capacity, past.shape[3]]
                try:
                    buffer = ort.OrtValue.ortvalue_from_shape_and_type(shape, ELEMENTS[past.type], *device)
                except (MemoryError, RuntimeError) as error:
                    raise UserError(
                        f"there is no memory for keys and values of {self.batch} x {self.capacity} tokens: ask for fewer"
                    ) from error
                self._binding.bind_ortvalue_input(past.name, buffer)
                self._binding.bind_ortvalue_output(past.name.replace("past_key_values", "present"), buffer)

    def run(self, feed: dict[str, NDArray], chunk_size: int) -> dict[str, NDArray]:
        """Runs the model on top of what the buffers hold, and leaves the new keys and values there.

        Args:
            feed: all inputs but the cache. ``attention_mask[B, T]`` says how many slots are in use after this call:
                T of at most ``capacity``; the S new tokens come last.
            chunk_size: at the most so many tokens of each sequence are run at once.

        Returns:
            All outputs but the cache, by name; of the logits those of the last chunk.
        """
        length, mask = feed["input_ids"].shape[1], feed["attention_mask"]
        cached = mask.shape[1] - length
        outputs: dict[str, NDArray] = {}
        saved, tokens, executed = [], [], []
        for start in range(0, length, chunk_size):
            end = min(start + chunk_size, length)
            part = {name: np.ascontiguousarray(feed[name][:, start:end]) for name in ("input_ids", "position_ids")}
            part["attention_mask"] = np.ascontiguousarray(mask[:, : cached + end])
            outputs.clear()  # a chunk's logits may be large
            outputs |= self._run(feed | part)
            saved.append(outputs["routing_saved"])
            tokens.append(int(mask[:, cached + start : cached + end].sum()))
            if "executed" in outputs:
                executed.append(outputs["executed"])
        if len(tokens) > 1:
            outputs["routing_saved"] = np.average(saved, axis=0, weights=tokens).astype(np.float32)
            if executed:
                outputs["executed"] = np.concatenate(executed, axis=3)
        return outputs

    def _run(self, feed: dict[str, NDArray]) -> dict[str, NDArray]:
        # bind_cpu_input refuses inputs that have defaults. These values borrow the arrays' memory until the call is over.
        for name, array in feed.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        names = [value.name for value in self.session.get_outputs() if not value.name.startswith("present.")]
        for name in names:
            self._binding.bind_output(name, "cpu")  # anew: its shape may be another one
        self.session.run_with_iobinding(self._binding)
        outputs = self._binding.get_outputs()[-len(names) :]
        return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}
