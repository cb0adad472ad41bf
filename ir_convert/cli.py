"""The command line: ``ir-convert MODEL --out PATH`` and ``ir-convert generate ARTIFACT PROMPT``."""

import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import click
from rich.console import Console

from . import __version__
from .choices import INT4_METHODS, KV_CACHES, LOGITS, RECIPES, TARGETS
from .errors import UserError, one_line

FILE = click.Path(path_type=Path)
SEED = click.IntRange(0, 2**32 - 1)


def _share(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuses a sparsity that is none before torch and transformers are loaded, which takes seconds."""
    from .curve import require_share

    if value is not None:
        require_share(value)
    return value


@click.command("ir-convert", epilog="Run what came out: ir-convert generate ARTIFACT PROMPT (--help for its options).")
@click.argument("model")
@click.option(
    "--out",
    required=True,
    multiple=True,
    type=FILE,
    help="NAME.onnx, NAME.safetensors (routing file), or a folder (see --target). May be repeated.",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="hf",
    show_default=True,
    help="What an --out folder holds. hf: a Hugging Face checkpoint. triton: a model for Triton's model repository.",
)
@click.option(
    "--sparsity",
    type=float,
    callback=_share,
    help="Share of the layers' FLOPs to save, in [0, 1).  [default: 0.4, or the routing file's]",
)
@click.option(
    "--calibration",
    multiple=True,
    metavar="TEXT[=WEIGHT]",
    help="Text like what the model will serve: a text, .jsonl or .parquet file, a folder, or a Hub data set "
    "(name:config:split). May be repeated; a WEIGHT of 2 takes twice the tokens of one without.  "
    "[default: Python's documentation topics, which suit few models]",
)
@click.option("--text-field", default="text", show_default=True, help="Where .jsonl, .parquet and data sets keep text.")
@click.option(
    "--routing", type=FILE, metavar="FILE", help="Use an earlier conversion's routing file instead of calibrating."
)
@click.option(
    "--tokens", type=click.IntRange(1), default=131072, show_default=True, help="Calibration tokens, at most."
)
@click.option("--block-size", type=click.IntRange(16), default=512, show_default=True, help="Tokens seen together.")
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    default="local",
    show_default=True,
    help="local: layer by layer. paper: the published recipe, end to end, 20 to 50 times as long. greedy: skips, forecasts nothing.",
)
@click.option(
    "--polish", type=click.IntRange(0), default=0, show_default=True, help="End-to-end steps after the recipe."
)
@click.option("--lora", is_flag=True, help="Adapt the base weights last (--recipe paper).")
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True, help="Of paper and greedy training.")
@click.option("--units", default="attention,mlp", show_default=True, help="Which units are routed: both, or one.")
@click.option(
    "--rank",
    type=click.IntRange(0),
    help="Mean rank of the forecasters; 0 forecasts a unit's mean.  [default: width / 16, from 8 to 100]",
)
@click.option(
    "--router-width",
    type=click.IntRange(0),
    help="Hidden units of the routers; 0 scores all tokens of a unit alike: whole units switch.  [default: by width]",
)
@click.option(
    "--kv-cache",
    type=click.Choice(KV_CACHES),
    default="full",
    show_default=True,
    help="strict: approximated tokens leave no keys and values.",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    help="In end-to-end stages: less memory, more time. May be added when an interrupted run goes on.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Precision of what is written; auto: float32 in ONNX, the base model's in a checkpoint. "
    "ONNX in bfloat16 runs on GPUs alone.",
)
@click.option(
    "--int4",
    is_flag=True,
    help="Quantise the units of ONNX files to 4 bits (in float32 also forecasters and routers), the head to 8.",
)
@click.option(
    "--int4-method",
    type=click.Choice(INT4_METHODS),
    help="How to round them; hqq is slow on CPUs, and not for mixtures of experts.  [default: rtn, or the routing file's]",
)
@click.option(
    "--calibrate-quantised",
    is_flag=True,
    help="Calibrate on the units as int4 leaves them: for --int4, or for a routing file that is to serve it.",
)
@click.option(
    "--logits",
    type=click.Choice(LOGITS),
    default="all",
    show_default=True,
    help="Which an ONNX file gives: of all tokens, or of each text's last alone, which is all that generation needs.",
)
@click.option("--trace", is_flag=True, help="ONNX files say which tokens each unit executed: an output 'executed'.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@click.option("--restart", is_flag=True, help="Forget the work of an interrupted run, and begin anew.")
@click.version_option(__version__)
def convert(model: str, out: tuple[Path, ...], units: str, **options: object) -> None:
    """Turn MODEL, a local folder or a Hub id, into one that decides per token which units to run.

    \b
    ir-convert meta-llama/Llama-2-7b-hf --out ir-llama/ir-llama.onnx
    ir-convert ./my-model --out my-ir-model/ --sparsity 0.3 --calibration domain.txt
    ir-convert ./my-model --out model_repository/ir-model --target triton
    accelerate launch -m ir_convert ./my-model --out my-ir-model/

    Interrupted? Run the same command again: it goes on where it stopped.
    """
    from .convert import convert as pipeline
    from .progress import Bars
    from .report import summary, written
    from .stream import Team

    console = Console(stderr=True)
    kinds = [unit.strip() for unit in units.split(",") if unit.strip()]
    conversion = pipeline(model, out, units=kinds, report=Bars(console), **options)  # type: ignore[arg-type]
    if conversion.sizes:
        shown = [lambda: Console().print(summary(conversion))] if conversion.routing.measured else []
        shown += [partial(click.echo, line) for line in written(conversion)]
        failures = []
        for show in shown:
            try:
                show()
            except (OSError, UnicodeError) as error:  # a full disk; a table on a terminal of ASCII
                failures.append(error)
        if failures:
            click.echo(f"ir-convert: all is written, but cannot be shown: {failures[0]}", err=True)
    Team().disband()


@click.command("ir-convert generate")
@click.argument("artifact", type=FILE)
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--sparsity", type=float, callback=_share, help="Share of FLOPs to save, in [0, 1).  [default: the artifact's]"
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 for greedy decoding.")
@click.option("--seed", type=SEED, default=0, show_default=True)
def generate(artifact: Path, prompt: str, **options: object) -> None:
    """Continue PROMPT, standard input for -, with ARTIFACT, an .onnx file or a checkpoint folder that ir-convert wrote."""
    from .generate import generate as stream

    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").removesuffix("\n")
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a terminal may send other bytes
    with closing(stream(artifact, prompt, **options)) as pieces:  # type: ignore[arg-type]
        click.echo(prompt, nl=False)
        for text in pieces:
            click.echo(text, nl=False)
        click.echo()


def main() -> None:
    """Runs the command; whatever the user can put right ends in one line and exit code 2."""
    arguments = sys.argv[1:]
    command = generate if arguments[:1] == ["generate"] else convert
    try:
        command.main(arguments[1:] if command is generate else arguments, command.name, standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.exceptions.Abort:
        if command is convert:
            same = "the same command" + (" without --restart" if "--restart" in arguments else "")
            click.echo(f"ir-convert: interrupted; {same} goes on where it stopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        said = error.format_message()
        if "unexpected extra argument" in said and command is convert:  # "convert MODEL", or --calibration A B
            said += " Beside MODEL everything is an option, and an option of several is repeated: --calibration A --calibration B"
        _fail(said)
    except UserError as error:
        _fail(str(error))
    except OSError as error:  # a folder closed to us, a full disk
        _fail(f"{error.filename or 'cannot write'}: {error.strerror}" if error.strerror else one_line(error))


def _fail(message: str) -> None:
    click.echo(f"ir-convert: {message}", err=True)
    sys.exit(2)
