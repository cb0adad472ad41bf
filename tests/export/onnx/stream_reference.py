"""The method as calibration runs it, layer by layer on unpadded texts: what every exported model has to compute."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.families import UNITS
from ir_convert.routing import Routing
from ir_convert.stream import routed_unit


@dataclass
class Streamed:
    """What came out.

    Attributes:
        logits: ``[B, S, vocab]``; padding's are zero.
        executed: tokens executed by routed (layer, unit), bool ``[B, S]``.
        margin: the smallest distance of a score from the threshold: much nearer than that, rounding decides.
    """

    logits: Tensor
    executed: dict[tuple[int, str], Tensor]
    margin: float


class StreamReference:
    """Runs a routing on a base model, its low-rank changes folded in. It reads the weights once: these models are tiny."""

    def __init__(self, checkpoint: Checkpoint, routing: Routing) -> None:
        def decoder() -> Decoder:
            return Decoder(checkpoint.with_lora(routing.lora), torch.device("cpu"))

        self.decoder, self.routing = decoder(), routing
        # A decoder keeps one part at a time.
        self._layers = [decoder().layer(index) for index in range(self.decoder.config.num_hidden_layers)]
        self._head = decoder().head()

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, threshold: float) -> Streamed:
        """Runs each text of ``ids[B, S]`` by itself, without the padding that ``mask[B, S]`` says it has."""
        result = Streamed(torch.zeros(*ids.shape, self.decoder.config.vocab_size), {}, torch.inf)
        for key in self.routing.units:
            result.executed[key] = torch.zeros_like(mask, dtype=torch.bool)
        rows = [(row, mask[row].bool()) for row in range(len(ids))]
        streams = [self.decoder.embed(ids[row][real][None]) for row, real in rows]
        for index, layer in enumerate(self._layers):
            for unit in UNITS:
                routed = self.routing.units.get((index, unit))
                for row, real in rows:
                    if routed is not None:
                        scores = routed.router(layer.norm(unit, streams[row]))
                        result.margin = min(result.margin, float((scores - threshold).abs().min()))
                    streams[row], executed = routed_unit(
                        layer, unit, routed, streams[row], threshold, self.routing.kv_cache
                    )
                    if executed is not None:
                        result.executed[index, unit][row, real] = executed[0]
        for row, real in rows:
            result.logits[row, real] = self._head(streams[row])[0]
        return result
