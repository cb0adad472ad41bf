"""The attention functions on their own, against plain torch: any mask, any cache, every optional input, every variant."""

from unittest.mock import patch

import torch
from function_call import EPSILON, HEAD, D, added, execute_mask, execute_masks, factors, methods, quantised, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ir_convert.export.onnx import attend
from ir_convert.export.onnx.body import Features
from ir_convert.export.onnx.functions import attention


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.one_of(st.just(1), st.integers(1, 7)),
    past=st.integers(0, 5),
    spare=st.sampled_from([None, 0, 3]),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    kind=execute_masks,
    method=methods,
    optional=st.sets(st.sampled_from(["q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm", "post_norm"])),
    variant=st.sampled_from(["full", "strict", "dense"]),
    rotary_dim=st.sampled_from([0, 0, 4]),
    softcap=st.sampled_from([0.0, 0.0, 1.5]),
    whole_norms=st.booleans(),
    factor=factors,
    span=st.sampled_from([1, 3, attend.SPAN]),
)
def test_attention(
    seed,
    batch,
    length,
    past,
    spare,
    groups,
    kv_heads,
    kind,
    method,
    optional,
    variant,
    rotary_dim,
    softcap,
    whole_norms,
    factor,
    span,
):
    torch.manual_seed(seed)
    heads, total = groups * kv_heads, past + length
    q, kv = heads * HEAD, kv_heads * HEAD
    shapes = {"q_weight": (D, q), "k_weight": (D, kv), "v_weight": (D, kv), "o_weight": (q, D)}
    shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,), "o_bias": (D,), "post_norm": (D,)}
    shapes |= {"q_norm": (q if whole_norms else HEAD,), "k_norm": (kv if whole_norms else HEAD,)}
    x = {name: torch.randn(shape) for name, shape in shapes.items() if name.endswith("_weight") or name in optional}
    inputs, int4 = quantised(x, method)
    optional = [name for name in inputs if not name.endswith(("_weight", "_scales"))]
    rotated = rotary_dim or HEAD
    angles = torch.rand(batch, length, rotated // 2) * 6
    x |= {"h": torch.randn(batch, length, D), "forecast": torch.randn(batch, length, D)}
    x |= {"cos": angles.cos(), "sin": angles.sin(), "execute": execute_mask(kind, batch, length)}
    x |= {f"past_{part}": torch.randn(batch, kv_heads, past, HEAD) for part in ("key", "value")}
    x["mask"] = torch.rand(batch, length, total) < 0.6
    # What is computed sees itself; a token that does not execute may see nothing at all.
    computed = torch.ones_like(x["execute"]) if variant == "dense" else x["execute"]
    x["mask"] |= (torch.arange(total) == past + torch.arange(length)[:, None]) & computed[..., None]
    kept = torch.ones(batch, total, dtype=torch.bool)
    if variant == "strict":
        kept = torch.cat((torch.rand(batch, past) < 0.5, x["execute"]), 1)
        for part in ("key", "value"):
            x[f"past_{part}"] *= kept[:, None, :past, None]

    def project(name: str, count: int, rotate: bool) -> Tensor:
        y = x["h"] @ x[f"{name}_weight"] + x.get(f"{name}_bias", 0)
        if not whole_norms:
            y = y.view(batch, length, count, HEAD)
        if (norm := x.get(f"{name}_norm")) is not None:
            y = F.rms_norm(y, norm.shape, norm, EPSILON)
        y = y.view(batch, length, count, HEAD).transpose(1, 2)
        if not rotate:
            return y
        cos, sin = (part.repeat(1, 1, 2).unsqueeze(1) for part in (x["cos"], x["sin"]))
        y, rest = y[..., :rotated], y[..., rotated:]
        a, b = y.chunk(2, -1)
        return torch.cat((y * cos + torch.cat((-b, a), -1) * sin, rest), -1)

    key = torch.cat((x["past_key"], project("k", kv_heads, True)), 2) * kept[:, None, :, None]
    value = torch.cat((x["past_value"], project("v", kv_heads, False)), 2) * kept[:, None, :, None]
    scores = project("q", heads, True) @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~(x["mask"] & kept[:, None])[:, None], -torch.inf).softmax(-1)
    y = (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).reshape(batch, length, q)
    dense = added(y @ x["o_weight"] + x.get("o_bias", 0), x, factor)

    if spare is not None:  # a buffer with room; nothing of what lies in its unused slots may be seen
        for part in ("key", "value"):
            unused = torch.full((batch, kv_heads, length + spare, HEAD), torch.nan)
            x[f"past_{part}"] = torch.cat((x[f"past_{part}"], unused), 2)
    x["start"] = torch.full((batch,), past, dtype=torch.int32)
    x["total"] = torch.tensor([total], dtype=torch.int32)
    x["step"] = torch.tensor([batch == length == 1 and spare is not None])
    x["step_bias"] = torch.zeros(batch, 1, 1, total).masked_fill(~x["mask"][:, None, -1:], -torch.inf)
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": HEAD, "scale": 0.3, "epsilon": EPSILON}
    attributes |= {"softcap": softcap, "rotary_dim": rotary_dim, "residual_multiplier": factor}
    features = Features(whole_norms=whole_norms, scaled=factor != 1)
    kv_cache = "strict" if variant == "strict" else "full"
    with patch.object(attend, "SPAN", span):
        function = attention(optional, variant != "dense", kv_cache, int4=int4, features=features)
    output, *present = run(function, x | inputs, **attributes)
    assert all(part.shape[2] == total + (spare or 0) for part in present)
    present_key, present_value = (part[:, :, :total] for part in present)
    expected = dense if variant == "dense" else torch.where(x["execute"][..., None], dense, x["forecast"])
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(present_key, key, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(present_value, value, atol=1e-4, rtol=1e-5)
    # What is left out of a strict cache is zero to the bit, and nothing else is.
    assert present_key.ne(0).any(-1).any(1).equal(kept)


def test_strict_keys_whose_components_add_up_to_nothing():
    """A token is in the cache where its key has any component: not where they have a sum."""
    torch.manual_seed(0)
    x = {"q_weight": torch.randn(D, HEAD), "v_weight": torch.randn(D, HEAD), "o_weight": torch.randn(HEAD, D)}
    x |= {"k_weight": torch.zeros(D, HEAD), "k_bias": torch.tensor([1.0, -1.0]).repeat(HEAD // 2)}
    x |= {"h": torch.randn(1, 3, D), "forecast": torch.zeros(1, 3, D), "execute": torch.ones(1, 3, dtype=torch.bool)}
    x |= {"cos": torch.ones(1, 3, HEAD // 2), "sin": torch.zeros(1, 3, HEAD // 2)}
    x |= {"mask": torch.ones(1, 3, 3, dtype=torch.bool).tril(), "step_bias": torch.zeros(1, 1, 1, 3)}
    x |= {f"past_{part}": torch.zeros(1, 1, 0, HEAD) for part in ("key", "value")}
    x |= {"start": torch.zeros(1, dtype=torch.int32), "total": torch.tensor([3], dtype=torch.int32)}
    x["step"] = torch.tensor([False])
    sizes = {"num_heads": 1, "kv_num_heads": 1, "head_dim": HEAD, "scale": 0.3}
    output, *_ = run(attention(["k_bias"], kv_cache="strict"), x, **sizes)
    values = (x["h"] @ x["v_weight"]).cumsum(1) / torch.arange(1, 4)[:, None]  # all keys are equal
    torch.testing.assert_close(output, values @ x["o_weight"], atol=1e-5, rtol=1e-5)
