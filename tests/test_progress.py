import io
import re
import time

from rich.console import Console

from ir_convert.progress import Bars


def test_what_an_earlier_run_did_is_no_speed():
    screen = io.StringIO()
    with Bars(Console(file=screen, width=120)).stage("refit", 4, tokens=100, done=3) as advance:
        time.sleep(0.05)
        advance()
    shown = screen.getvalue()
    assert "4/4" in shown
    (rate,) = re.findall(r"([\d,]+) tokens/s", shown)
    assert 0 < int(rate.replace(",", "")) <= 100 / 0.05


def test_brackets_in_names_are_no_markup():
    screen = io.StringIO()
    bars = Bars(Console(file=screen, width=120))
    bars.note("Going on with the interrupted run in /runs[old]/.m.work.")
    with bars.stage("write m[en].onnx", 1) as advance:
        advance()
    assert "/runs[old]/.m.work" in screen.getvalue()
    assert "write m[en].onnx" in screen.getvalue()
