"""Import this first to run a benchmark from a checkout that is not installed: it puts the project's packages in reach."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if importlib.util.find_spec("ir_convert") is None:
    sys.path.insert(0, str(ROOT))
import ir_convert  # noqa: E402

if importlib.util.find_spec("ir_convert.export") is None:  # it lies beside the package, and is imported as a part of it
    ir_convert.__path__.append(str(ROOT))
