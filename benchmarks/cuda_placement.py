"""Shows what ONNX Runtime's CUDA provider makes of a model, on a machine without a GPU.

    pip install --no-deps --target FOLDER onnxruntime-gpu
    python benchmarks/cuda_placement.py MODEL.onnx --onnxruntime FOLDER [--library libir_ops.so]

The provider is the real one; under it lies a stand-in for CUDA (cuda_placement.cpp), which computes nothing. So this tells where
nodes are placed, what is copied, which kernels are launched, and what the provider refuses; not what comes out, nor how fast.
Needs Linux, g++, nm, and CUDA's headers, as nvcc brings them.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import from_source  # noqa: F401

SOURCE = Path(__file__).with_suffix(".cpp")
PLACED = re.compile(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(")
# Of every library that the provider needs, the calls that the stand-in for it has.
LIBRARIES = {"libcudart.so.13": None, "libcublas.so.13": r"cublas(?!Lt)", "libcublasLt.so.13": r"cublasLt",
             "libcuda.so.1": r"cu[A-Z]", "libcurand.so.10": r"curand"}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--onnxruntime", type=Path, required=True, help="where onnxruntime-gpu was installed to")
    parser.add_argument("--library", type=Path, help="of native kernels; they are placed, not launched")
    parser.add_argument("--cuda", type=Path, default=Path("/usr/local/cuda"), help="where CUDA's headers are")
    parser.add_argument("--tokens", type=int, default=7, help="of the prompt; the steps after it are one each")
    parser.add_argument("--executed", type=int, default=1, help="tokens that every unit executes")
    parser.add_argument("--stand-in", type=Path, metavar="FOLDER", help="only compile the stand-in, into this folder")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.inside:
        return run(args.model, args.library, args.tokens)
    if args.stand_in:
        return build(args.stand_in, args.onnxruntime, args.cuda)
    if args.model is None:
        parser.error("name a model")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), args.onnxruntime, args.cuda)
        paths = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": str(args.onnxruntime), "EXECUTED": str(args.executed)}
        command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments), "--inside"]
        done = subprocess.run(command, env=os.environ | paths, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    print("\n".join(report(done.stderr)))


def build(folder: Path, onnxruntime: Path, cuda: Path) -> None:
    """Compiles the stand-in for each library that the provider needs."""
    provider = next(onnxruntime.glob("onnxruntime/capi/libonnxruntime_providers_cuda.so"), None)
    if provider is None:
        raise SystemExit(
            f"{onnxruntime} has no onnxruntime-gpu: pip install --no-deps --target {onnxruntime} onnxruntime-gpu"
        )
    if not (cuda / "include" / "cuda_runtime.h").is_file():
        raise SystemExit(f"{cuda} has no include/cuda_runtime.h: name CUDA's folder by --cuda")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1].split("@")[0] for line in listed.splitlines()}
    for library, pattern in LIBRARIES.items():
        source, versions = folder / "stub.cpp", folder / "versions"
        calls = (stub(name) for name in sorted(names) if pattern and re.match(pattern, name))
        source.write_text(
            SOURCE.read_text("utf-8") if pattern is None else "#include <cstdlib>\n" + "\n".join(calls), "utf-8"
        )
        versions.write_text(f"{library} {{ global: *; }};\n", "utf-8")
        options = ["-shared", "-fPIC", "-std=c++17", f"-I{cuda / 'include'}", f"-Wl,--version-script={versions}"]
        subprocess.run(["g++", *options, source, "-o", folder / library], check=True)


def stub(name: str) -> str:
    """Returns a call that succeeds; one that makes a handle gives some memory for it."""
    kind = "const char*" if name.endswith(("Name", "String")) else "int"
    if re.search(r"Create(_v2)?$", name):
        return f'extern "C" int {name}(void** handle) {{ *handle = std::malloc(64); return 0; }}'
    return f'extern "C" {kind} {name}(...) {{ return {0 if kind == "int" else chr(34) * 2}; }}'


def run(model: Path, library: Path | None, tokens: int) -> None:
    """Loads a model on the provider, which tells the log about it, and runs a prompt and two steps."""
    import numpy as np
    import onnxruntime as ort
    from speed_session import open_session

    from ir_convert.runtime import OnnxModel
    from ir_convert.runtime import model as generation

    generation.require_numbers = lambda *_: None  # type: ignore[assignment]  # nothing computes any
    library = library and library.resolve()
    options = ort.SessionOptions()
    options.log_severity_level, options.log_verbosity_level = 0, 1
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    loaded = OnnxModel.load(model, providers, options=options, library=library or False)
    try:
        open_session(model, "cuda", 1, library=library, graph=True)
        print("CUDA graphs can be captured")
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        print(f"CUDA graphs cannot be captured: {str(error).splitlines()[0]}")
    print("[done] loading", file=sys.stderr, flush=True)
    if library is None:
        for step, _ in enumerate(loaded.generate(np.full((1, tokens), 3), max_new_tokens=3, eos_ids=())):
            print(f"[done] {step}", file=sys.stderr, flush=True)


def report(log: str) -> Iterator[str]:
    """Tells in a few lines what the log says."""
    _, _, placed = log.rpartition("Node(s) placed on [CPUExecutionProvider]")
    on_cpu, _, on_cuda = placed.partition("Node(s) placed on [CUDAExecutionProvider]")
    for where, text in (("the CPU", on_cpu), ("the GPU", on_cuda)):
        kinds = Counter(PLACED.findall(text))
        yield f"on {where}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    copies = re.findall(r"Add (Memcpy\w+) (?:after|before) (\S+)", log)
    yield f"nodes that copy between them: {len(copies)}"
    yield from sorted({f"  {kind} {re.sub(r'_token_[0-9]+', '', name)}" for kind, name in copies})
    _, *pieces = re.split(r"\[done\] .*\n", log)
    for name, piece in zip(("the prompt", "a step"), pieces, strict=False):
        if launches := piece.count("[cuda] launch"):
            moved = Counter(re.findall(r"\[cuda\] copy (.*)", piece))
            yield f"{name}: {launches} launches, " + ", ".join(f"{count} copies {way}" for way, count in moved.items())


if __name__ == "__main__":
    main()
