"""Decide on its own, against plain torch."""

from dataclasses import replace

import onnx_ir as ir
import torch
from function_call import TYPES, D, execute_mask, execute_masks, quantised, run
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_convert.export.onnx.functions import decide
from ir_convert.export.onnx.int4 import Int4
from ir_convert.units import Forecaster, RoutedUnit, Router


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    rank=st.integers(0, 5),
    width=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float16]),
    int4=st.booleans(),
    kind=execute_masks,
)
def test_decide(seed, batch, length, rank, width, dtype, int4, kind):
    torch.manual_seed(seed)
    int4 = int4 and rank > 0 and dtype == torch.float32
    forecaster = Forecaster(torch.randn(rank, D), torch.randn(rank), torch.randn(D, rank), torch.randn(D))
    forecaster = Forecaster(*(vars(forecaster)[name].to(dtype) for name in vars(forecaster)))
    router = Router(torch.randn(width, D), torch.randn(width), torch.randn(1, width), torch.randn(1))
    weights = {"hidden_weight": router.hidden.T}
    if rank:
        weights |= {"down_weight": forecaster.down.T, "up_weight": forecaster.up.T}
    inputs, _ = quantised(weights, "rtn" if int4 else None)  # and the weights are now what they come back as
    if int4:
        forecaster = replace(forecaster, down=weights["down_weight"].T, up=weights["up_weight"].T)
        router = replace(router, hidden=weights["hidden_weight"].T)
    h = torch.randn(batch, length, D).to(dtype)
    score = RoutedUnit(forecaster, router).router(h.float())
    wanted = execute_mask(kind, batch, length)
    x = {"h": h, "threshold": score + torch.where(wanted, -1.0, 1.0)}
    if kind in ("none", "all"):
        x["threshold"] = torch.full((batch, length), -torch.inf if kind == "all" else torch.inf)
    if rank:
        x["down_bias"] = forecaster.down_bias
    x |= {"up_bias": forecaster.bias, "hidden_bias": router.hidden_bias}
    x |= {"out_weight": router.out[0], "out_bias": router.out_bias} | inputs
    types = {"forecast": TYPES[dtype], "execute": ir.DataType.BOOL}
    function = decide(rank > 0, TYPES[dtype], Int4(accuracy_level=1) if int4 else None)
    sizes = {"hidden_size": D, "rank": rank, "codes": rank + width + 1} if int4 else {}
    forecast, execute, got = run(function, x, types, **sizes)
    assert execute.equal(wanted)
    torch.testing.assert_close(got, score, atol=1e-4, rtol=1e-5)
    expected = Forecaster(*(part.float() for part in vars(forecaster).values()))(h.float())
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(forecast.float(), expected, atol=tolerance, rtol=tolerance)
