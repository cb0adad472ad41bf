"""The CUDA kernels' own sources, compiled for the host, where blocks and threads take turns; called through ctypes."""

import ctypes
import subprocess
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int, c_size_t, c_void_p
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from op_units import Unit

from ir_convert.export.onnx.ops.library import SOURCES

UNITS = SOURCES / "kernels" / "cuda" / "emulate" / "units.cpp"
BFLOAT16 = ml_dtypes.bfloat16
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(BFLOAT16): 2}
ORDERS = ("forward", "reversed", "random")  # in which the threads of a block, and blocks, take their turns


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Contribution(Structure):
    _fields_ = _fields(c_void_p, "post_norm") + _fields(c_float, "epsilon multiplier")


class Decide(Structure):
    _fields_ = [
        *_fields(c_int, "tokens width rank hidden"),
        *_fields(c_void_p, "h threshold down_weight down_bias up_weight up_bias"),
        *_fields(c_void_p, "hidden_weight hidden_bias out_weight out_bias forecast execute score"),
    ]


class Mlp(Structure):
    _fields_ = [
        *_fields(c_int, "batch sequence width hidden"),
        *_fields(c_void_p, "h forecast execute gate_weight up_weight down_weight gate_bias up_bias down_bias"),
        ("activation", c_int),
        ("contribution", Contribution),
        ("output", c_void_p),
    ]


class HeadShape(Structure):
    _fields_ = _fields(c_int, "heads kv_heads head_dim")


class Rotary(Structure):
    _fields_ = _fields(c_void_p, "cos sin") + _fields(c_int, "dim")


class Cache(Structure):
    _fields_ = _fields(c_void_p, "key value") + _fields(c_int, "slots") + _fields(c_void_p, "start")


class Attention(Structure):
    _fields_ = [
        *_fields(c_int, "batch sequence width total past_slots"),
        ("shape", HeadShape),
        ("strict", c_bool),
        *_fields(c_void_p, "h forecast execute mask"),
        ("rotary", Rotary),
        *_fields(
            c_void_p,
            "past_key past_value q_weight k_weight v_weight o_weight q_bias k_bias v_bias o_bias q_norm k_norm",
        ),
        *_fields(c_bool, "whole_q_norm whole_k_norm"),
        *_fields(c_float, "scale softcap"),
        ("contribution", Contribution),
        ("output", c_void_p),
        ("cache", Cache),
    ]


def compile_units(to: Path, *options: str) -> None:
    command = [
        "g++",
        "-std=c++17",
        "-O2",
        "-g1",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    subprocess.run([*command, *options, "-o", str(to), str(UNITS)], check=True)


class Emulator:
    """The compiled kernels.

    Args:
        library: what ``compile_units`` wrote.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name, call in (("decide", Decide), ("mlp", Mlp), ("attention", Attention)):
            run, size = (getattr(self._library, f"emulate_{name}{part}") for part in ("", "_bytes"))
            run.argtypes, run.restype = (c_int, c_int, c_int, c_bool, POINTER(call)), c_char_p
            size.restype = c_size_t
            assert size() == ctypes.sizeof(call)

    def run(
        self, unit: Unit, order: str = "forward", multiprocessors: int = 2, in_place: bool = True,
        capturing: bool = False,
    ) -> list[NDArray]:  # fmt: skip
        """Returns the outputs, which were NaN before.

        Args:
            unit: the call.
            order: one of ``ORDERS``.
            multiprocessors: of the device that is emulated; how work is split depends on it.
            in_place: whether a past with room is the present too.
            capturing: whether the stream is captured in a CUDA graph; what is put on it is done at once nevertheless.
        """
        inputs = {name: np.ascontiguousarray(x) for name, x in unit.inputs.items()}
        outputs = unit.poisoned()
        batch, sequence, width = inputs["h"].shape
        sizes = {"batch": batch, "sequence": sequence, "width": width}
        if unit.function == "Decide":
            rank, hidden = len(inputs.get("down_bias", ())), len(inputs["hidden_bias"])
            call, run = Decide(batch * sequence, width, rank, hidden), self._library.emulate_decide
        elif unit.function.endswith("MLP"):
            call, run = Mlp(**sizes), self._library.emulate_mlp
        else:
            call, run = Attention(**sizes), self._library.emulate_attention
        for name, x in inputs.items():
            if hasattr(call, name):
                setattr(call, name, _address(x))
        if isinstance(call, Decide):
            call.forecast, call.execute, call.score = map(_address, outputs)
        else:
            self._contributing(call, unit, inputs, outputs[0])
        if isinstance(call, Mlp):
            call.hidden = inputs["gate_weight"].shape[1]
            call.activation = ("silu", "gelu_pytorch_tanh").index(unit.attributes["activation"])
        if isinstance(call, Attention):
            outputs[1:] = self._attention(call, unit, inputs, in_place, outputs[1:])
        failed = run(TYPES[unit.dtype], multiprocessors, ORDERS.index(order), capturing, byref(call))
        if failed is not None:
            raise RuntimeError(failed.decode())
        return outputs

    def _contributing(self, call: Mlp | Attention, unit: Unit, inputs: dict[str, NDArray], output: NDArray) -> None:
        attributes, norm = unit.attributes, _address(inputs.get("post_norm"))
        call.contribution = Contribution(norm, attributes["epsilon"], attributes["residual_multiplier"])
        call.output = _address(output)

    def _attention(
        self, call: Attention, unit: Unit, inputs: dict[str, NDArray], in_place: bool, present: list[NDArray]
    ) -> list[NDArray]:
        """Fills in the call; returns the present, which is the one given where it is apart from the past."""
        attributes, past = unit.attributes, inputs["past_key"].shape
        call.total, call.past_slots = unit.total, past[2]
        call.shape = HeadShape(attributes["num_heads"], attributes["kv_num_heads"], attributes["head_dim"])
        call.strict = unit.function.endswith("Strict")
        call.rotary = Rotary(_address(inputs["cos"]), _address(inputs["sin"]), 2 * inputs["cos"].shape[-1])
        for part in "qk":
            norm = inputs.get(f"{part}_norm")
            setattr(call, f"whole_{part}_norm", norm is not None and len(norm) != attributes["head_dim"])
        call.scale, call.softcap = attributes["scale"], attributes["softcap"]
        if unit.in_place and in_place:
            present = [inputs[name] for name in ("past_key", "past_value")]
            if present[0] is unit.inputs["past_key"]:
                present = [x.copy() for x in present]
            call.past_key, call.past_value = map(_address, present)
        call.cache = Cache(*map(_address, present), present[0].shape[2], _address(inputs["start"]))
        return present


def _address(x: NDArray | None) -> int | None:
    return None if x is None else x.ctypes.data
