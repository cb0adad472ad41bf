"""The language model in a multimodal checkpoint converts as one that is alone."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from models import SIZES, edit, random_routing
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    LlavaConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.errors import UserError
from ir_convert.evaluate import logits
from ir_convert.export import hf, onnx
from ir_convert.runtime import OnnxModel
from ir_convert.wrapper import TWINS

TEXT = SIZES | {"head_dim": 16, "sliding_window": 7}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 48,
}
QWEN_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
CONFIGS = {
    "gemma3": lambda: Gemma3Config(
        text_config=TEXT,
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        eos_token_id=[1, 106],
    ),
    "mistral3": lambda: Mistral3Config(
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 16},
        text_config=TEXT | {"model_type": "mistral"},
        image_token_index=5,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=SIZES | {"rope_theta": 5000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config=QWEN_VISION | {"fullatt_block_indexes": [0]},
        **QWEN_TOKENS,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config=SIZES
        | {"head_dim": 16, "rope_theta": 5000.0}
        | {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]},
        **QWEN_TOKENS,
    ),
    "llava": lambda: LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=TEXT | {"model_type": "llama"},
        image_token_index=5,
    ),
}
if not transformers.__version__.startswith("4."):
    CONFIGS["llava_mixtral"] = lambda: LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=TEXT | {"model_type": "mixtral", "num_local_experts": 4},
        image_token_index=5,
    )
# As models have been published, and as transformers would call the tensors inside.
SPELLINGS = {
    "published": ("language_model.model.", "language_model.lm_head."),
    "inside": ("model.language_model.", "lm_head."),
    "flat": ("model.", "lm_head."),
}
KINDS = [(kind, spelling) for kind in CONFIGS for spelling in ("published", "inside") if "qwen" not in kind]
KINDS += [("qwen2_5_vl", "flat"), ("qwen2_5_vl", "inside"), ("qwen3_vl", "inside")]


def words_after_spaces():
    """As Llama 2's: whoever builds that tokenizer anew, by its class, gives other tokens after special ones."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b"])}
    inner = Tokenizer(BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def gemma3(folder):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS["gemma3"]())
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=KINDS, ids="-".join)
def wrapped(request, tmp_path):
    """(multimodal model, its folder)"""
    kind, spelling = request.param
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[kind](), attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "model")
    words_after_spaces().save_pretrained(tmp_path / "model")
    named = "Qwen2Tokenizer" if "qwen" in kind else "LlamaTokenizer"
    edit(tmp_path / "model" / "tokenizer_config.json", tokenizer_class=named)
    path, (decoder, head) = tmp_path / "model" / "model.safetensors", SPELLINGS[spelling]
    tensors = {}
    for name, tensor in load_file(path).items():
        for saved in (part for parts in SPELLINGS.values() for part in parts):
            if name.startswith(saved) and "visual" not in name:
                name = (head if "lm_head" in saved else decoder) + name.removeprefix(saved)
                break
        tensors[name] = tensor
    assert any(name.startswith(decoder) for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return model, tmp_path / "model"


@torch.no_grad()
def test_its_language_model_converts(wrapped, tmp_path):
    model, folder = wrapped
    checkpoint = Checkpoint.open(str(folder))
    kind = model.config.text_config.model_type
    assert checkpoint.config.model_type == TWINS.get(kind, kind)
    ends = getattr(model.config, "eos_token_id", None)
    assert ends is None or checkpoint.config.eos_token_id == ends
    routing = random_routing(checkpoint)
    for part in ("hf", "onnx"):
        (tmp_path / part).mkdir()
    hf.write(checkpoint, routing, tmp_path / "hf")
    onnx.write(checkpoint, routing, tmp_path / "onnx", "m.onnx")
    assert AutoConfig.from_pretrained(tmp_path / "onnx").model_type == checkpoint.config.model_type

    base = AutoTokenizer.from_pretrained(folder)
    for part in ("hf", "onnx"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / part, trust_remote_code=part == "hf")
        for text in ("a b</s>a", " a", "b a"):
            assert tokenizer(text)["input_ids"] == base(text)["input_ids"]

    ids = torch.randint(6, 131, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions, real = (mask.cumsum(1) - 1).clamp(min=0), mask.bool()
    inner = model.model.language_model
    expected = model.lm_head(inner(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state)
    exported = hf.load(tmp_path / "hf", dtype=torch.float32).eval()
    exported.set_sparsity(0)
    runtime = OnnxModel.load(tmp_path / "onnx", threads=1, sparsity=0.0)
    for found in (
        exported(input_ids=ids, attention_mask=mask, position_ids=positions).logits,
        torch.from_numpy(runtime.logits(ids.numpy(), mask.numpy())),
    ):
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
    assert np.isfinite(runtime.logits(ids.numpy())).all()
    assert Decoder(checkpoint, torch.device("cpu")).layer(2)


@torch.no_grad()
def test_settings_of_qwen_as_published(tmp_path):
    """The language model's lie beside the other's."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS["qwen2_5_vl"]()).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    outer = json.loads(path.read_text())
    inner = outer.pop("text_config")
    for name in ("rope_parameters", "model_type", "layer_types"):
        inner.pop(name, None)
    inner |= {"rope_theta": 5000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    path.write_text(json.dumps(inner | outer))
    ids = torch.randint(9, 131, (1, 12), generator=torch.Generator().manual_seed(0))
    found = logits(Decoder(Checkpoint.open(str(tmp_path)), torch.device("cpu")), {}, ids, -math.inf)
    torch.testing.assert_close(found, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_either_configuration_may_tie(tmp_path):
    gemma3(tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=False)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert "lm_head.weight" not in checkpoint.shards
    assert checkpoint.tied


def test_what_lies_beside_is_not_counted(tmp_path):
    model = gemma3(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.weight_bytes == 4 * sum(weight.numel() for weight in model.model.language_model.parameters())


def quantised(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def not_causal(folder):
    PaliGemmaConfig(text_config={"model_type": "gemma2"}).save_pretrained(folder)


def unknown_names(folder):
    path = folder / "model.safetensors"
    save_file({f"x.{name}": tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (quantised, "weights quantised by .* are not read: convert the model they were made from"),
        (not_causal, "in 'paligemma' a prompt's tokens see those that follow them: convert a causal model"),
        (unknown_names, "a model of type 'gemma3' whose tensors have unknown names, first 'x"),
    ],
)
def test_one_clear_line(damage, message, tmp_path):
    gemma3(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint.open(str(tmp_path))
    assert "\n" not in str(caught.value)
