"""Checkpoints of families that are put together from what other families are tested for."""

import json
import math

import pytest
import torch
import transformers
from models import RELATIVES, edit, make_random, random_routing, save_random
from routed_models import Exported, export, tokens
from torch.testing import assert_close
from transformers import OlmoeConfig

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError
from ir_convert.export.hf import write
from ir_convert.export.hf.configuration_ir import IROlmo3Config, IROlmoeConfig
from ir_convert.export.hf.modeling_ir import IROlmoeForCausalLM
from ir_convert.rope import rope_parameters

TEXT = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module", params=RELATIVES)
def exported(request, tmp_path_factory) -> Exported:
    made = make_random(request.param, tmp_path_factory.mktemp(request.param))
    return export(made, tmp_path_factory.mktemp(f"ir-{request.param}"))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Rows of 20, 14 and 9 tokens, padded on either side."""
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, :6] = mask[2, 9:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens(3, 20) * mask, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def test_dense_is_the_base_model(exported, batch):
    exported.model.set_sparsity(0)
    real = batch["attention_mask"].bool()
    assert_close(exported.model(**batch).logits[real], exported.base(**batch).logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_routed_is_the_reference(exported, batch, attention):
    exported.model.set_attn_implementation(attention)
    real = batch["attention_mask"].bool()
    for threshold in (-2.0, exported.routing.threshold, 2.0, math.inf):
        exported.set_threshold(threshold)
        with exported.model.routing_statistics() as seen:
            logits = exported.model(**batch).logits
        assert 0 < seen.decisions <= 1
        assert_close(logits[real], exported.reference(**batch).logits[real], atol=1e-4, rtol=1e-4)


def test_greedy_text(exported):
    """With a cache, in one of fixed size, without, and padded on the left, as the reference writes it."""
    rows = [tokens(1, length, seed=length) for length in (5, 11)]
    ids = torch.cat([torch.nn.functional.pad(row, (11 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.arange(11)[None] >= 11 - row.shape[1] for row in rows]).long()
    together = exported.model.generate(ids, attention_mask=mask, **TEXT)[:, 11:]
    for row, text in zip(rows, together, strict=True):
        expected = exported.reference.generate(row, **TEXT)
        assert expected[0, row.shape[1] :].equal(text)
        for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert exported.model.generate(row, **TEXT, **how).equal(expected)


def test_the_activation_of_gemma_by_its_old_name(tmp_path):
    """Published configurations say ``gelu``, and mean its tanh form, which version 4 of transformers does not know."""
    save_random("gemma", tmp_path / "base")
    edit(tmp_path / "base" / "config.json", hidden_act="gelu")
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    assert checkpoint.config.hidden_act == "gelu_pytorch_tanh"
    assert checkpoint.written_config["hidden_act"] == "gelu"
    (tmp_path / "ir").mkdir()
    write(checkpoint, random_routing(checkpoint), tmp_path / "ir")
    assert json.loads((tmp_path / "ir" / "config.json").read_text())["hidden_act"] == "gelu_pytorch_tanh"


@pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="of version 4 of transformers")
def test_olmoe_needs_version_5(tmp_path):
    OlmoeConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="models of type 'olmoe' need transformers 5 or newer, and this is 4"):
        Checkpoint.open(str(tmp_path))
    with pytest.raises(ValueError, match="ir_olmoe needs transformers 5 or newer, and this is 4"):
        IROlmoeForCausalLM(IROlmoeConfig(num_hidden_layers=1))


def test_bases_of_olmo_3(tmp_path):
    """Local and global layers have one base in version 4 of transformers, each its own in version 5."""
    config = IROlmo3Config.from_dict({"model_type": "ir_olmo3", "rope_theta": 1000.0, "num_hidden_layers": 4})
    assert {rope_parameters(config, layer)["rope_theta"] for layer in range(4)} == {1000.0}
    kinds = {"full_attention": {"rope_theta": 1000.0}, "sliding_attention": {"rope_theta": 70.0}}
    parameters = {kind: {"rope_type": "default", **base} for kind, base in kinds.items()}
    written = {"model_type": "ir_olmo3", "rope_parameters": parameters, "num_hidden_layers": 4}
    if transformers.__version__ < "5":
        with pytest.raises(ValueError, match=r"sliding layers rotate by .*70.0.*: use transformers 5"):
            IROlmo3Config.from_dict(written)
        save_random("olmo3", tmp_path)
        for damage, message in (
            (parameters, "sliding layers rotate by"),
            ({"full_attention": {}}, "'sliding_attention'"),
        ):
            edit(tmp_path / "config.json", rope_parameters=damage)
            with pytest.raises(UserError, match=message):
                Checkpoint.open(str(tmp_path))
    else:
        config = IROlmo3Config.from_dict(written)
        assert [rope_parameters(config, layer)["rope_theta"] for layer in range(4)] == [70.0, 70.0, 70.0, 1000.0]
