"""Converts a large random checkpoint under a memory limit, and says what a layer costs.

    python benchmarks/scale.py --parameters 1.5 --shape 7B --tokens 1536 [--device cpu] [--processes 2] [--out results.json]

Random weights calibrate to nothing useful; time and memory do not care. The checkpoint is written a layer at a time, in shards.
With several processes, memory and processor time are those of the process that takes most.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers
from quality_setting import processor, save
from speed_models import Shape, write_checkpoint
from transformers import PretrainedConfig

# Hidden and MLP width, heads, key/value heads of well-known models; how many layers, the parameters asked for say.
SHAPES = {"1B": (2048, 5632, 32, 4), "7B": (4096, 11008, 32, 32), "70B": (8192, 28672, 64, 8)}
VOCABULARY = 32000


def write_model(folder: Path, billions: float, name: str) -> PretrainedConfig:
    """Writes a random Llama of about so many parameters in bfloat16, one shard a layer."""
    hidden, ffn, heads, kv_heads = SHAPES[name]
    layer = 2 * hidden * hidden + 2 * hidden * (hidden // heads) * kv_heads + 3 * hidden * ffn
    layers = max(1, math.ceil((billions * 1e9 - 2 * VOCABULARY * hidden) / layer))
    return write_checkpoint(folder, Shape(layers, hidden, ffn, heads, kv_heads, VOCABULARY)).config


def parameters(config: PretrainedConfig) -> int:
    """Returns how many parameters a Llama with a head of its own has."""
    hidden, kv = config.hidden_size, config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size + 2 * hidden
    return config.num_hidden_layers * layer + 2 * config.vocab_size * hidden + hidden


def resident(pid: int) -> tuple[int, int]:
    """Returns a process's anonymous resident memory and its whole resident memory, in bytes (Linux)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmHWM"))  # type: ignore[return-value]


def processor_seconds(pid: int) -> float:
    """Returns the processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """Returns a process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.5, help="in billions")
    parser.add_argument("--shape", choices=SHAPES, default="7B", help="of a layer")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="that share the work")
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="JSON results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        model = Path(temporary) / "model"
        config = write_model(model, args.parameters, args.shape)
        stages: dict[str, list[float]] = {}
        command = [sys.executable, "-m"]
        if args.processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", args.processes, "-m"]
        command += ["ir_convert", model, "--out", Path(temporary) / "routing.safetensors"]
        command += ["--tokens", args.tokens, "--block-size", args.block_size, "--device", args.device]
        process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
        peaks, spent = [0, 0], 0.0

        def watch() -> None:
            nonlocal spent
            work = Path(temporary) / ".routing.safetensors.work" / ("process-0" if args.processes > 1 else "")
            seen: set[str] = set()
            while process.poll() is None:
                try:
                    for pid in family(process.pid):
                        anonymous, whole = resident(pid)
                        peaks[0], peaks[1] = max(peaks[0], anonymous), max(peaks[1], whole)
                        spent = max(spent, processor_seconds(pid))
                    for file in set(os.listdir(work)) - seen:
                        seen.add(file)
                        if file.endswith(".safetensors") and "." in file.removesuffix(".safetensors"):
                            stages.setdefault(file.rsplit(".", 2)[0], []).append(time.monotonic())
                except (OSError, KeyError):  # it is just ending
                    pass
                time.sleep(0.05)

        watcher = threading.Thread(target=watch)
        start = time.monotonic()
        watcher.start()
        _, messages = process.communicate()
        watcher.join()
        seconds = time.monotonic() - start
    if process.returncode:
        raise SystemExit(messages)
    per_layer = {stage: (times[-1] - times[0]) / (len(times) - 1) for stage, times in stages.items() if len(times) > 1}
    result = {
        "parameters": parameters(config),
        "shape": args.shape,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "tokens": args.tokens,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "processes": args.processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": seconds,
        "processor_seconds": spent,
        "seconds_per_layer": per_layer,
        "peak_resident_bytes": peaks[1],
        "peak_anonymous_bytes": peaks[0],
        "said_before": next((line for line in messages.splitlines() if "will take about" in line), ""),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        save(args.out, result)


if __name__ == "__main__":
    main()
