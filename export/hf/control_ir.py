"""Holds a sparsity on drifting text. This file travels with the checkpoint, see modeling_ir.py; ONNX models use it too."""

import math

GAIN = 2.0  # thresholds are logs: this closes most of a gap in a window or two, and does not swing
WINDOW = 256


class SparsityControl:
    """Integral control of the threshold: ``threshold += gain * (sparsity - saved)``, once a window of tokens.

    Short calls add up until there is a window of them: what one token saves says little.

    Attributes:
        sparsity: the share of FLOPs to save.
        threshold: where the threshold stands.

    Raises:
        ValueError: a gain that is not positive.
    """

    def __init__(self, sparsity: float, threshold: float, gain: float = GAIN) -> None:
        if not 0 < gain < math.inf:
            raise ValueError(f"gain {gain:g} does not lead anywhere: give a positive number, such as {GAIN:g}")
        self.gain = gain
        self.start(sparsity, threshold)

    def start(self, sparsity: float, threshold: float) -> None:
        """Begins anew with another share to save."""
        self.sparsity, self.threshold = sparsity, threshold
        self._saved, self._tokens = 0.0, 0

    def observe(self, saved: float, tokens: int) -> float:
        """Takes the share of FLOPs that a call saved on its tokens; returns the threshold for the next call."""
        self._saved += saved * tokens
        self._tokens += tokens
        if self._tokens >= WINDOW:
            self.threshold += self.gain * (self.sparsity - self._saved / self._tokens)
            self._saved, self._tokens = 0.0, 0
        return self.threshold
