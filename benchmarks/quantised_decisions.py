"""What it costs to quantise forecasters and routers: the same fit, its weights rounded in different ways.

    python benchmarks/quantised_decisions.py MODEL --calibration cal.txt --text test.txt --sparsity 0.4

``set`` is what the calibration's threshold saves on the text; perplexity and KL are interpolated to exactly the asked sparsity.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import from_source  # noqa: F401
import torch
from quality_measure import Routed, figures, interpolate
from quality_setting import read_text
from torch import Tensor

from ir_convert.calibrate import Options
from ir_convert.calibrate.recipes import fit
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Source, read_blocks
from ir_convert.export.onnx.int4 import Int4, dequantised
from ir_convert.export.onnx.int8 import quantise
from ir_convert.progress import Silent
from ir_convert.stream import Team, Work
from ir_convert.units import RoutedUnit

STEP = 0.1  # to the thresholds on either side of the calibrated one
Rounding = Callable[[Tensor], Tensor]


def unrounded(weight: Tensor) -> Tensor:
    return weight


def int8(weight: Tensor) -> Tensor:
    packed, scales = quantise(weight)
    return ((packed.float() - 128) * scales.unsqueeze(-1)).flatten(1)[:, : weight.shape[1]].contiguous()


def int4(weight: Tensor) -> Tensor:
    return dequantised(weight, Int4())


WAYS: dict[str, tuple[Rounding, Rounding]] = {  # of forecasters, of routers
    "float32": (unrounded, unrounded),
    "forecasters in int8": (int8, unrounded),
    "forecasters in int4": (int4, unrounded),
    "routers in int4": (unrounded, int4),
    "both in int4": (int4, int4),
}


def rounded(unit: RoutedUnit, forecasters: Rounding, routers: Rounding) -> RoutedUnit:
    forecaster, router = unit.forecaster, unit.router
    if forecaster.rank:
        forecaster = replace(forecaster, down=forecasters(forecaster.down), up=forecasters(forecaster.up))
    return RoutedUnit(forecaster, replace(router, hidden=routers(router.hidden)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", type=Path, required=True, help="what is measured on")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration text")
    parser.add_argument("--test-tokens", type=int, default=32768)
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    blocks = read_blocks([Source(args.calibration)], checkpoint.tokenizer, args.tokens)
    ids = read_text(args.text, checkpoint, args.test_tokens)
    options = Options(sparsity=args.sparsity).settled(checkpoint.config)
    fitted = fit(checkpoint, blocks, options, torch.device("cpu"), Work(), Team(), Silent())
    print(f"{'':<22}{'perplexity':>12}{'KL':>9}{'set':>9}")
    for name, ways in WAYS.items():
        units = {key: rounded(unit, *ways) for key, unit in fitted.units.items()}
        threshold = fitted.near[1]
        routed = Routed(units, fitted.decoder, options.kv_cache, threshold, STEP)
        _, *around = figures(routed, ids, [threshold - STEP, threshold, threshold + STEP])
        exact = interpolate(around, args.sparsity)
        row = math.exp(exact["log_perplexity"]), exact["kl"], around[1]["achieved"]
        print("{:<22}{:>12.3f}{:>9.4f}{:>9.4f}".format(name, *row), flush=True)


if __name__ == "__main__":
    main()
