"""PyTorch, Hugging Face and ONNX Runtime are one model: same decisions, same logits, same text; on the trained model."""

import json
import math
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime as ort
import pytest
import torch
from trained import Converted

from ir_convert.evaluate import logits as torch_logits
from ir_convert.export.onnx import write
from ir_convert.families import UNITS
from ir_convert.routing import Routing
from ir_convert.runtime import OnnxModel
from ir_convert.units import merge

TIE = 1e-5
NEW = 64
SPARSITIES = (0.25, 0.5)


@pytest.fixture(scope="module")
def ort_model(converted: Converted) -> OnnxModel:
    return OnnxModel.load(converted.onnx)


@pytest.fixture(scope="module")
def ids(converted: Converted) -> torch.Tensor:
    return converted.unseen[:6, :200]


def at(converted: Converted, ort_model: OnnxModel, sparsity: float) -> float:
    """Sets both artifacts' dials; returns the threshold."""
    converted.routed.set_sparsity(sparsity)
    ort_model.set_sparsity(sparsity)
    threshold = converted.routing.curve.at(sparsity)
    assert ort_model.threshold == threshold
    assert converted.routed.config.routing_threshold == (threshold if sparsity else "-inf")
    return threshold


def test_dense_threshold_is_the_base_model(converted, ort_model, ids):
    at(converted, ort_model, 0)
    with torch.no_grad():
        base = converted.base(ids).logits
        hf = converted.routed(ids).logits
    in_torch = torch_logits(converted.decoder, converted.routing.units, ids, -math.inf)
    in_ort = torch.from_numpy(ort_model.logits(ids.numpy()))
    for name, logits in {"torch": in_torch, "hf": hf, "ort": in_ort}.items():
        assert (logits - base).abs().max() < 1e-4, name


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_same_decisions_and_logits(sparsity, converted, ort_model, ids):
    threshold = at(converted, ort_model, sparsity)
    scores, in_torch = run_torch(converted, ids, threshold)
    execute = scores > threshold
    assert 0.1 < execute.float().mean() < 0.9  # routing does decide
    tied = ((scores - threshold).abs() < TIE).any(dim=(0, 2))  # sequences in which some decision hangs by a hair
    assert tied.float().mean() < 0.5
    for name, run in {"hf": run_hf, "ort": run_ort}.items():
        decisions, logits = run(converted, ids, threshold)
        assert torch.equal(decisions[:, ~tied], execute[:, ~tied]), name
        assert (logits - in_torch)[~tied].abs().max() < 1e-4, name


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_same_greedy_text_with_and_without_cache(sparsity, converted, ort_model):
    """64 tokens, from prompts of different lengths, batched with left padding and one by one."""
    threshold = at(converted, ort_model, sparsity)
    rows = [converted.unseen[row, :length] for row, length in ((0, 40), (3, 23), (5, 9))]
    width = max(map(len, rows))
    batch = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])

    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    hf = converted.routed
    batched = hf.generate(batch, attention_mask=mask, **options)[:, width:]
    ort = np.stack(list(ort_model.generate(batch.numpy(), mask.numpy(), max_new_tokens=NEW, eos_ids=())), 1)
    for index, row in enumerate(rows):
        cached = hf.generate(row[None], **options)[0, len(row) :]
        uncached = hf.generate(row[None], use_cache=False, **options)[0, len(row) :]
        assert torch.equal(cached, uncached)
        assert torch.equal(cached, batched[index])
        assert cached.tolist() == ort[index].tolist()
        alone = ort_model.generate(row[None].numpy(), max_new_tokens=NEW, eos_ids=())
        assert cached.tolist() == [int(step[0]) for step in alone]
        # Run whole: every token is the likeliest after all before it, so each step without a cache would take it.
        text = torch.cat([row, cached])[None]
        for logits in (run_torch(converted, text, threshold)[1], torch.from_numpy(ort_model.logits(text.numpy()))):
            assert torch.equal(logits[0, len(row) - 1 : -1].argmax(-1), cached)


def test_work_is_skipped_inside_onnx_runtime(converted, ort_model, ids, tmp_path):
    """Counts the rows that entered each matrix product, from ONNX Runtime's own profile."""
    threshold = at(converted, ort_model, 0.5)
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    profiled = OnnxModel.load(converted.onnx, sparsity=0.5, options=options)
    profiled.logits(ids.numpy())
    events = json.loads(Path(profiled.session.end_profiling()).read_text())
    config, rows = converted.checkpoint.config, Counter()
    for event in events:
        if event.get("args", {}).get("op_name") in ("MatMul", "Gemm") and "_inlfunc_Routed" in event["name"]:
            (shape,) = event["args"]["output_type_shape"][0].values()
            rows[shape[-1]] += math.prod(shape[:-1])
    execute = run_torch(converted, ids, threshold)[0] > threshold
    attention, mlp = execute[0::2].sum().item(), execute[1::2].sum().item()
    d, f = config.hidden_size, config.intermediate_size
    slack = 4  # decisions that hang by a hair
    assert abs(rows[f] - 2 * mlp) <= slack  # gate and up
    assert abs(rows[d] - mlp - 2 * attention) <= slack  # down, q and o
    assert rows[2 * config.head_dim] == 2 * config.num_hidden_layers * ids.numel()  # k and v: every token


def run_torch(converted: Converted, ids: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scores ``[units, batch, sequence]`` and logits of the routed model as calibration runs it."""
    scores, x = [], converted.decoder.embed(ids)
    with torch.no_grad():
        for index, layer in converted.decoder.layers():
            for unit in UNITS:
                routed = converted.routing.units[index, unit]
                h = layer.norm(unit, x)
                scores.append(routed.router(h))
                x = x + merge(scores[-1] > threshold, layer.contribution(unit, x), routed.forecaster(h))
        return torch.stack(scores), converted.decoder.head()(x)


def run_hf(converted: Converted, ids: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns decisions ``[units, batch, sequence]`` and logits of the checkpoint."""
    decisions: list[torch.Tensor] = []
    routers = [module for name, module in converted.routed.named_modules() if name.endswith(".router")]
    hooks = [
        router.register_forward_hook(lambda module, args, score: decisions.append(score > threshold))
        for router in routers
    ]
    with torch.no_grad():
        logits = converted.routed(ids).logits
    for hook in hooks:
        hook.remove()
    return torch.stack(decisions), logits


def run_ort(converted: Converted, ids: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns decisions ``[units, batch, sequence]`` and logits of the ONNX model, exported once more with its trace."""
    with TemporaryDirectory() as folder:
        routing = Routing.load(converted.onnx.with_name(f"{converted.onnx.stem}.routing.safetensors"))
        write(converted.checkpoint, routing, Path(folder), "traced.onnx", trace=True)
        model = OnnxModel.load(folder, threshold=threshold)
        logits, _ = model.forward(ids.numpy())
    assert model.executed is not None
    return torch.from_numpy(model.executed).flatten(0, 1), torch.from_numpy(logits)
