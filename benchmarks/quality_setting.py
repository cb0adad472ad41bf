"""What a benchmark runs on: texts as token blocks, and the facts that a result must name to be repeated."""

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import ir_convert
from ir_convert.checkpoint import Checkpoint
from ir_convert.data import Blocks, Source, read_blocks

BLOCK = 512


def parse_texts(texts: Sequence[str]) -> dict[str, Path]:
    """Reads ``NAME=PATH`` arguments."""
    pairs = [text.partition("=") for text in texts]
    for name, _, path in pairs:
        if not name or not Path(path).is_file():
            raise SystemExit(f"--text {name}={path}: give NAME=PATH of a text file")
    return {name: Path(path) for name, _, path in pairs}


def read_text(path: Path, checkpoint: Checkpoint, tokens: int, block: int = BLOCK) -> torch.Tensor:
    """Returns blocks ``[count, block]`` spread over a file, at most ``tokens`` of them, cut as calibration text is."""
    blocks = read_blocks([Source(str(path))], checkpoint.tokenizer, tokens, block)
    return torch.cat([blocks.fit, blocks.threshold, blocks.test])


def describe(
    checkpoint: Checkpoint, texts: dict[str, Path], ids: dict[str, torch.Tensor], blocks: Blocks, device: str
) -> dict[str, Any]:
    """Returns the part of a result's configuration that every benchmark has, ready for JSON."""
    parameters = sum(checkpoint.read(name).numel() for name in checkpoint.shards)
    return {
        "model": {
            "name": Path(checkpoint.name).name,
            "type": checkpoint.config.model_type,
            "layers": checkpoint.config.num_hidden_layers,
            "hidden": checkpoint.config.hidden_size,
            "parameters": parameters,
            "weights_sha256": checkpoint.weights_sha256,
        },
        "texts": {
            name: {"sha256": hashlib.sha256(texts[name].read_bytes()).hexdigest(), "tokens": rows.numel()}
            for name, rows in ids.items()
        },
        "calibration": {
            "sha256": blocks.sha256,
            "tokens": {part: getattr(blocks, part).numel() for part in ("fit", "threshold", "test")},
            "mixture": blocks.mixture(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "ir_convert": ir_convert.__version__,
        },
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if device.startswith("cuda") else processor(),
        "device": device,
    }


def code_sha256() -> str:
    """Returns a hash of the converter's sources: results of one table should come from one state of the code."""
    digest, root = hashlib.sha256(), Path(ir_convert.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def resident(field: str = "VmHWM") -> int:
    """Returns this process's peak (``VmHWM``) or present (``VmRSS``) resident memory in bytes; 0 where it is not told.

    Not ``getrusage``: what it gives to a new process includes its parent's size.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def command_line() -> str:
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def processor() -> str:
    """Returns the name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes results whole: a run that is stopped leaves those of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    temporary.replace(path)
