"""One model in one ONNX Runtime session: how it is opened, bound, timed, and asked what it executed.

All inputs and outputs are bound to memory that is allocated once, so that neither Python nor allocation is timed. How the
cache is bound is in one place, ``Cache``.
"""

import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto
from transformers import PretrainedConfig

from ir_convert.families import UNITS, head_dim
from ir_convert.flops import Key

ROOM = 64  # free places in a cache that is written in place, beyond what the call needs
# A decision as the exporter names it: in the main graph, whatever becomes of the function that it is handed to.
DECISION = re.compile(r"layers\.(?P<layer>\d+)\.(?P<unit>attention|mlp)\.execute")
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# The processor's own clock leaves out what other processes take of a busy core; it is of use with one thread only.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_ERRORS_ONLY, _NOTHING = 3, 4
# How far logits may differ, over the largest of them, and be the same but for the order of sums. int4 rounds activations to 8
# bits, which alone makes 0.01 of that; a model that sees the free places of a cache is 1 off.
_ALIKE = {"fp32": 1e-3, "fp16": 1e-3, "int4": 0.05}
_GRAPHS = itertools.count(1)


@dataclass(frozen=True)
class Point:
    """What is run: ``tokens`` new ones after ``cached`` ones, in each of ``batch`` sequences."""

    tokens: int
    cached: int = 0
    batch: int = 1

    @property
    def kind(self) -> str:
        return "decode" if self.cached else "prefill"

    @property
    def total(self) -> int:
        return self.cached + self.tokens

    def __str__(self) -> str:
        size = f"{self.cached} cached" if self.cached else f"{self.tokens} tokens"
        return f"{self.kind}, {size}, batch {self.batch}"


def open_session(
    path: Path,
    device: str,
    threads: int,
    profile: Path | None = None,
    library: Path | None = None,
    graph: bool = False,
) -> ort.InferenceSession:
    """Opens a model: so many threads in an operator, one operator at a time, threads spin as they do by default.

    Args:
        library: of native kernels, which take over the units' functions.
        graph: on CUDA, whether runs are captured in CUDA graphs and replayed; a ``Runner`` has to be told, too.
    """
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    providers = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    settings = [{"enable_cuda_graph": "1"} if graph and provider.startswith("CUDA") else {} for provider in providers]
    session = ort.InferenceSession(str(path), options, providers=providers, provider_options=settings)
    if session.get_providers()[0] != providers[0]:
        raise RuntimeError(f"{providers[0]} did not start: onnxruntime runs on {session.get_providers()}")
    return session


class Cache:
    """Keys and values before and after a call, as the caller of a model holds them.

    Concatenated: the call reads ``[B, K, P, D]`` and writes all of ``[B, K, P + S, D]``. In place: both are one buffer that
    is longer than P + S, and the call writes its own S places.
    """

    def __init__(
        self, session: ort.InferenceSession, config: PretrainedConfig, point: Point, in_place: bool, device: str
    ) -> None:
        self.in_place = in_place
        generator, pasts = np.random.default_rng(0), [i for i in session.get_inputs() if i.name.startswith("past")]
        heads, width = config.num_key_value_heads, head_dim(config)
        length = point.total + ROOM if in_place else point.cached
        self.pasts, self.presents = {}, {}
        for value in pasts:
            dtype = NUMPY[value.type]
            content = np.zeros((point.batch, heads, length, width), dtype)
            content[:, :, : point.cached] = generator.standard_normal(
                (point.batch, heads, point.cached, width), np.float32
            )
            # An empty tensor is left on the CPU: there is nothing to copy.
            past = ort.OrtValue.ortvalue_from_numpy(content, device if content.size else "cpu", 0)
            present = past
            if not in_place:
                shape = [point.batch, heads, point.total, width]
                present = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0)
            name = value.name.replace("past_key_values", "present")
            self.pasts[value.name], self.presents[name] = past, present


class Runner:
    """Runs a session on one point: every call goes through all steps, which differ in their tokens."""

    def __init__(
        self,
        session: ort.InferenceSession,
        config: PretrainedConfig,
        point: Point,
        steps: Sequence[NDArray[np.int64]],
        threshold: float | None = None,
        in_place: bool = False,
        device: str = "cpu",
        clock: str = "wall",
        logits: ort.OrtValue | None = None,
        graph: bool = False,
        cache: Cache | None = None,
    ) -> None:
        self._session, self._point, self._device, self._clock = session, point, device, CLOCKS[clock]
        self.options = [ort.RunOptions() for _ in steps]
        if graph:  # every step has buffers of its own, and so a CUDA graph of its own
            for options in self.options:
                options.add_run_config_entry("gpu_graph_id", str(next(_GRAPHS)))
        self._kept: list[ort.OrtValue] = []  # a bound value on the CPU is the array's own memory
        self._cache = cache or Cache(session, config, point, in_place, device)
        self._logits = room_for_logits(session, config, point, device) if logits is None else logits
        self._saved = [ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, device, 0) for _ in steps]
        self._bindings = [self._bind(ids, saved, threshold) for ids, saved in zip(steps, self._saved, strict=True)]

    def __call__(self) -> float:
        """Returns the seconds of one step."""
        if len(self._bindings) > 1:  # wakes threads and caches up after another session's turn
            self._run(len(self._bindings) - 1)
        start = self._clock()
        for step in range(len(self._bindings)):
            self._run(step)
        return (self._clock() - start) / len(self._bindings)

    def saved(self) -> float:
        """Returns the share of FLOPs that the last round of steps saved, as the model itself says."""
        return float(np.mean([value.numpy()[0] for value in self._saved]))

    def logits(self) -> NDArray:
        """Returns the last step's logits."""
        return self._logits.numpy()

    def _run(self, step: int) -> None:
        self._session.run_with_iobinding(self._bindings[step], self.options[step])
        self._bindings[step].synchronize_outputs()

    def _bind(self, ids: NDArray[np.int64], saved: ort.OrtValue, threshold: float | None) -> ort.IOBinding:
        binding, known = self._session.io_binding(), input_names(self._session)
        for name, array in feeds(self._point, ids, threshold).items():
            if name in known:
                value = ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
                binding.bind_ortvalue_input(name, value)
                self._kept.append(value)
        for name, value in self._cache.pasts.items():
            binding.bind_ortvalue_input(name, value)
        outputs = {"logits": self._logits, "routing_saved": saved, **self._cache.presents}
        for output in self._session.get_outputs():
            binding.bind_ortvalue_output(output.name, outputs[output.name])
        return binding


def room_for_logits(session: ort.InferenceSession, config: PretrainedConfig, point: Point, device: str) -> ort.OrtValue:
    """Allocates what a call writes its logits to: so large for long prompts that runners had better share it."""
    (logits,) = (value for value in session.get_outputs() if value.name == "logits")
    shape = [point.batch, 1 if logits.shape[1] == 1 else point.tokens, config.vocab_size]
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, NUMPY[logits.type], device, 0)


def input_names(session: ort.InferenceSession) -> set[str]:
    """Returns what a model can be given; an input with a default is listed apart by onnxruntime."""
    return {value.name for value in [*session.get_inputs(), *session.get_overridable_initializers()]}


def feeds(point: Point, ids: NDArray[np.int64], threshold: float | None) -> dict[str, NDArray]:
    """Returns all inputs but the cache; a model takes those it has."""
    positions = np.arange(point.cached, point.total)[None].repeat(point.batch, axis=0)
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones((point.batch, point.total), np.int64),
        "position_ids": positions,
    }
    return feed if threshold is None else feed | {"routing_threshold": np.array([threshold], np.float32)}


def supports_in_place(
    session: ort.InferenceSession, config: PretrainedConfig, precision: str, device: str = "cpu"
) -> bool:
    """Tells whether a model writes into a cache that is longer than it needs, and computes the same as it does else."""
    point = Point(1, 8, 1)
    ids = [np.full((1, 1), 3, np.int64)]
    # Everything executes: near a threshold, another order of sums can change a decision, and so all that follows.
    threshold = -np.inf if "routing_threshold" in input_names(session) else None
    try:
        found = []
        for in_place in (False, True):
            runner = Runner(session, config, point, ids, threshold, in_place, device)
            runner.options[0].log_severity_level = _NOTHING
            runner()
            found.append(runner.logits().astype(np.float32))
    except Exception:  # onnxruntime's exceptions share no base class of their own
        return False
    return bool(np.abs(found[1] - found[0]).max() <= _ALIKE[precision] * np.abs(found[0]).max())


@dataclass
class Probe:
    """A routed model that also gives away what every unit executed, and its scores."""

    session: ort.InferenceSession
    config: PretrainedConfig
    executes: dict[Key, str]
    scores: dict[Key, str]
    _caches: dict[Point, Cache] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: Path, config: PretrainedConfig, device: str, threads: int, library: Path | None = None
    ) -> "Probe":
        """Adds the outputs to a model's graph, beside the model, which shares its weights."""
        model = onnx.load(path, load_external_data=False)
        producers = {name: node for node in model.graph.node for name in node.output}
        executes: dict[Key, str] = {}
        scores: dict[Key, str] = {}
        for name in producers:
            if match := DECISION.fullmatch(name):
                key = int(match["layer"]), match["unit"]
                executes[key] = name
                scores[key] = producers[name].output[2]
        if len(executes) != len(UNITS) * config.num_hidden_layers:
            raise RuntimeError(
                f"{path} shows the decisions of {len(executes)} units: those of every unit were expected"
            )
        for names, kind in ((executes, TensorProto.BOOL), (scores, TensorProto.FLOAT)):
            for name in names.values():
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
        probe = path.with_name("probe.onnx")
        onnx.save(model, probe)
        return cls(open_session(probe, device, threads, library=library), config, executes, scores)

    def run(self, point: Point, ids: NDArray[np.int64], threshold: float, everything: bool = False) -> dict[str, Any]:
        """Returns what one call ``saved`` as it says itself and, by unit, what it ``executes``.

        Args:
            point: the sizes of the call.
            ids: its tokens.
            threshold: above which a unit executes.
            everything: whether to return ``scores`` by unit, and the ``logits``, as well.
        """
        if point not in self._caches:
            self._caches = {point: Cache(self.session, self.config, point, False, "cpu")}
        feed = feeds(point, ids, threshold)
        feed |= {name: value.numpy() for name, value in self._caches[point].pasts.items()}
        names = ["routing_saved", *self.executes.values()]
        names += [*self.scores.values(), "logits"] if everything else []
        values = dict(zip(names, self.session.run(names, feed), strict=True))
        found = {
            "saved": float(values["routing_saved"][0]),
            "executes": {key: values[name] for key, name in self.executes.items()},
        }
        if everything:
            found["scores"] = {key: values[name] for key, name in self.scores.items()}
            found["logits"] = values["logits"]
        return found
