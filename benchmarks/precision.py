"""What int4 costs: size, perplexity and FLOPs saved of dense and routed ONNX models, measured in ONNX Runtime.

python examples/stdlib_text.py calibration > calibration.txt
python examples/stdlib_text.py test > test.txt
python benchmarks/precision.py examples/tiny-llama --calibration calibration.txt --text test.txt --sparsity 0.25
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from from_source import ROOT
from quality_setting import command_line, describe, read_text, save
from torch.nn import functional as F

from ir_convert.checkpoint import Checkpoint
from ir_convert.convert import convert
from ir_convert.data import Source, read_blocks
from ir_convert.runtime import OnnxModel

# (row's name, options beside the common ones)
CONVERSIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fp32", {}),
    ("int4", {"int4": True}),
    ("int4, calibrated on int4", {"int4": True, "calibrate_quantised": True}),
)

CLOSE, TRIES = 0.001, 8


def perplexity(model: OnnxModel, ids: torch.Tensor, threshold: float) -> tuple[float, float]:
    """Returns the perplexity per token of blocks ``[blocks, length]``, and the share of FLOPs saved."""
    model.threshold = threshold
    loss, saved = 0.0, 0.0
    for row in ids:
        logits = torch.from_numpy(model.logits(row[None].numpy())[0, :-1]).float()
        loss += float(F.cross_entropy(logits, row[1:]))
        saved += model.saved
    return math.exp(loss / len(ids)), saved / len(ids)


def at_exactly(model: OnnxModel, ids: torch.Tensor, sparsity: float) -> tuple[float, float]:
    """Returns the same at the threshold that saves what is asked on these very blocks."""
    aim = sparsity
    for _ in range(TRIES):
        routed, saved = perplexity(model, ids, model.curve.at(aim))
        if abs(saved - sparsity) < CLOSE:
            return routed, saved
        aim += sparsity - saved
    raise SystemExit(f"no threshold saves {sparsity:.1%} here: the last one tried saved {saved:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="what is measured on")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration text")
    parser.add_argument("--test-tokens", type=int, default=32768)
    parser.add_argument("--int4-method", default="rtn")
    parser.add_argument("--json", type=Path, help="by default benchmarks/results/precision-MODEL.json")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    ids = read_text(Path(args.text), checkpoint, args.test_tokens)
    blocks = read_blocks([Source(args.calibration)], checkpoint.tokenizer, args.tokens)
    rows = []
    print(
        f"{'ONNX model':<28}{'weights, MB':>12}{'dense ppl':>11}{'routed ppl':>12}{'saved':>8}{'at exactly':>12}{'saved':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, options) in enumerate(CONVERSIONS):
            out = Path(folder) / str(index) / "model.onnx"
            if options.get("int4"):
                options = options | {"int4_method": args.int4_method}
            common = {"calibration": [args.calibration], "sparsity": args.sparsity, "tokens": args.tokens}
            out.parent.mkdir()
            convert(args.model, [out], **common, **options)
            model = OnnxModel.load(out)
            dense, _ = perplexity(model, ids, -math.inf)
            routed, saved = perplexity(model, ids, float(model.metadata["threshold"]))
            exact, exactly = at_exactly(model, ids, args.sparsity)
            size = out.with_name("model.onnx.data").stat().st_size
            row = {"name": name, "bytes": size, "dense": dense, "routed": routed, "saved": saved}
            rows.append(row | {"exact": {"routed": exact, "saved": exactly}})
            print(
                f"{name:<28}{size / 1e6:>12.2f}{dense:>11.2f}{routed:>12.2f}{saved:>8.3f}{exact:>12.2f}{exactly:>8.3f}",
                flush=True,
            )
    setting = describe(checkpoint, {"text": Path(args.text)}, {"text": ids}, blocks, "cpu")
    result = {"command": command_line(), "setting": setting, "sparsity": args.sparsity, "rows": rows}
    path = args.json or ROOT / "benchmarks" / "results" / f"precision-{Path(args.model).name}.json"
    save(path, result)


if __name__ == "__main__":
    main()
