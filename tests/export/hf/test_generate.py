"""Generation: with a cache and without, in chunks, in batches."""

import gc

import pytest
import torch
import transformers
from routed_models import tokens
from torch.testing import assert_close
from transformers import DynamicCache

from ir_convert.rope import rotary_embedding

LONG = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
SHORT = {"max_new_tokens": 12, "min_new_tokens": 12}


def test_greedy_is_the_same_without_a_cache(exported):
    ids = tokens(1, 6)
    with exported.model.routing_statistics() as seen:
        cached = exported.model.generate(ids, **LONG)
    assert 0.1 < seen.decisions < 0.9
    assert cached.shape == (1, 70)
    assert cached.equal(exported.model.generate(ids, **LONG, use_cache=False))


def test_greedy_is_the_references(exported):
    ids = tokens(2, 6)
    assert exported.model.generate(ids, **SHORT).equal(exported.reference.generate(ids, **SHORT))


def test_greedy_with_a_static_cache(exported):
    ids = tokens(2, 9)
    static = exported.model.generate(ids, **SHORT, cache_implementation="static")
    assert static.equal(exported.model.generate(ids, **SHORT))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_changes_no_token(exported, attention):
    if attention not in exported.kernels:
        pytest.skip("this model has a soft cap, which sdpa has not")
    exported.model.set_attn_implementation(attention)
    lengths = [5, 11, 1, 8]
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (11 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.arange(11)[None] >= 11 - length for length in lengths]).long()
    together = exported.model.generate(ids, attention_mask=mask, **SHORT)[:, 11:]
    # Alone, a prompt of one token would meet a defect of some versions' static masks: none is used here.
    alone = [exported.model.generate(row, **SHORT)[:, row.shape[1] :] for row in rows]
    assert together.equal(torch.cat(alone))


@pytest.mark.skipif(transformers.__version__ < "5", reason="version 4 has another paged cache, which is refused")
@pytest.mark.parametrize(("blocks", "dense"), [(32, False), (8, True)])
def test_continuous_batching(exported, blocks, dense):
    """Prompts of all lengths in one row, over a paged cache; where that has little room, some begin again."""
    if dense:
        exported.set_threshold(-torch.inf)
    model, prompts = exported.model, [tokens(1, length, seed=length)[0].tolist() for length in (23, 4, 40, 1, 9)]
    texts = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    config = transformers.ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=32, page_size=16)
    gc.freeze()  # it collects garbage twice, which takes seconds among all that other tests hold
    with model.routing_statistics() as together:
        results = model.generate_batch(
            prompts, transformers.GenerationConfig(**texts), continuous_batching_config=config, progress_bar=False
        )
    gc.unfreeze()
    found = [result.generated_tokens for result in results.values()]
    with model.routing_statistics() as alone:
        expected = [model.generate(torch.tensor([prompt]), **texts)[0, len(prompt) :].tolist() for prompt in prompts]
    assert found == expected
    if blocks == 8:
        return
    assert together.tokens == alone.tokens
    assert together.sparsity == pytest.approx(alone.sparsity, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dense", [True, False])
def test_a_cache_by_either_of_its_names(exported, dense):
    """Layers hand it over as ``cache`` from version 5.24 of transformers on."""
    if dense:
        exported.set_threshold(-torch.inf)
    attention, config = exported.model.model.layers[0].self_attn, exported.model.config
    x = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(0))
    rotary, kind = rotary_embedding(exported.model.model, config, 0)
    angles = rotary(x, torch.arange(7)[None], *([] if kind is None else [kind]))
    outputs = []
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=config)
        outputs.append(attention(x, position_embeddings=angles, attention_mask=None, **{name: cache})[0])
        assert cache.get_seq_length() == 7
    assert outputs[0].equal(outputs[1])


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_prefill_in_chunks(exported, chunk):
    ids = tokens(2, 17)
    whole = exported.model(ids).logits
    cache = DynamicCache(config=exported.model.config)
    parts = [exported.model(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
    assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_beams_and_samples(exported):
    ids = tokens(2, 6)
    beams = exported.model.generate(ids, **SHORT, num_beams=3, do_sample=False)
    assert beams.equal(exported.model.generate(ids, **SHORT, num_beams=3, do_sample=False, use_cache=False))
    torch.manual_seed(0)
    samples = exported.model.generate(ids, **SHORT, do_sample=True, top_k=20, num_return_sequences=2)
    assert samples.shape == (4, 18)
