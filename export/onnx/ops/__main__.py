"""``python -m ir_convert.export.onnx.ops build``: builds the library. ``find``: where it is, and what it supports."""

from pathlib import Path

import click

from ir_convert.errors import UserError

from . import BUILD, build, find, level, supported


@click.group()
def main() -> None:
    """The library of native kernels for ONNX Runtime."""


@main.command("build")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write.  [default: in your cache folder]"
)
@click.option(
    "--cuda", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True, help="CUDA kernels."
)
@click.option("--sanitize", is_flag=True, help="With AddressSanitizer and UndefinedBehaviorSanitizer.")
def build_command(out: Path | None, cuda: str, sanitize: bool) -> None:
    """Builds the library."""
    click.echo(build(out, cuda, sanitize))


@main.command("find")
def find_command() -> None:
    """Prints where the library is, and what it has kernels for."""
    if (library := find()) is None:
        raise UserError(f"no library has been built: {BUILD}")
    click.echo(library)
    click.echo(f"  CPU kernels for {level(library)}")
    for kernel in sorted(supported(library)):
        click.echo("  " + " ".join(kernel))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
