"""Blocks go through the routed model a few at a time."""

import pytest
import torch
from models import random_routing, save_random

from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.stream import routed, run_routed


@pytest.mark.parametrize("kv_cache", ["full", "strict"])
def test_chunks_are_the_whole(kv_cache, tmp_path, monkeypatch):
    """Each at its own place in what comes out."""
    save_random("llama", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    decoder, units = Decoder(checkpoint, torch.device("cpu")), random_routing(checkpoint, kv_cache=kv_cache).units
    ids = torch.randint(3, 131, (7, 16), generator=torch.Generator().manual_seed(0))
    states, rates = run_routed(decoder, units, ids, [-1.0, 0.5], kv_cache)
    monkeypatch.setattr(routed, "CHUNK_TOKENS", 3 * 2 * 16)
    parted, others = run_routed(decoder, units, ids, [-1.0, 0.5], kv_cache)
    torch.testing.assert_close(parted[slice(0, 7)], states[slice(0, 7)])
    assert len(set(rates[0, "mlp"][1].tolist())) > 3
    assert all(torch.equal(others[key], rate) for key, rate in rates.items())
