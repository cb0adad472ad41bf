"""The short table at the end of a conversion."""

import os

from rich.markup import escape
from rich.table import Table

from ..convert import Conversion
from ..export.onnx import ops
from ..files import size_text


def summary(conversion: Conversion) -> Table:
    """Returns the table: quality and sparsity."""
    metadata = conversion.routing.metadata
    test = metadata["test"]
    error = "" if test["sparsity_standard_error"] is None else f" ± {test['sparsity_standard_error']:.1%}"
    quantised = conversion.routing.quantised_units
    units = f", on int4 units ({quantised['method']})" if quantised else ""
    table = Table(title=f"{escape(metadata['base_model'])} routed{units}", show_header=True, title_justify="left")
    moved_from = conversion.routing.moved_from
    table.add_column("on held-out text" + ("" if moved_from is None else f", set to {moved_from:.1%}"))
    for name in ("dense", "routed"):
        table.add_column(name, justify="right")
    table.add_row("perplexity (per token)", f"{test['perplexity_dense']:.2f}", f"{test['perplexity']:.2f}")
    table.add_row("same most likely token", "", f"{test['agreement']:.1%}")
    table.add_row("KL from dense (nats)", "", f"{test['kl']:.3f}")
    table.add_row("FLOPs saved, asked", "", f"{test['asked']:.1%}")
    table.add_row("FLOPs saved, achieved", "", f"{test['sparsity']:.1%}{error}")
    if len(test["sources"]) > 1:
        for name, row in test["sources"].items():
            table.add_row(f"- on {escape(name)}", "", f"{row['sparsity']:.1%}")
    table.add_row("decisions approximated", "", f"{test['decisions']:.1%}")
    return table


def written(conversion: Conversion) -> list[str]:
    """Returns the lines after the table: sizes and time. A path that a table breaks over lines could not be copied."""
    lines = [f"wrote {path}  {size_text(size)}" for path, size in conversion.sizes.items()]
    routing = conversion.routing
    if (measured := routing.moved_from) is not None:
        lines.append(f"set to {routing.sparsity:.1%} now, which has not been measured: the table is of {measured:.1%}")
    lines.append(f"time {conversion.seconds:.0f} s")
    named = ops.VARIABLE in os.environ  # or wanted away: it is empty then
    if any(path.suffix == ".onnx" for path in conversion.sizes) and not named and ops.find() is None:
        lines.append(f"ONNX files run faster with native kernels, which are not built yet: {ops.BUILD}")
    return lines
