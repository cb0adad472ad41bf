"""The recipes behind one door: each gives forecasters, routers, and about the threshold of the asked sparsity."""

from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..data import Blocks
from ..decoder import Decoder
from ..families import UNITS
from ..flops import Key
from ..progress import Reporter
from ..stream import Result, Team, Work, chunks
from ..units import Units, units_from_tensors, units_to_tensors
from .fitted import Fitted
from .foreign import with_foreign
from .local import fit_local
from .options import Options
from .threshold import Meter

# The published rates are for 2000 steps of whole batches; shorter runs take larger steps, up to a point. Forecasters of small
# models want three times the published 1e-3, routers half of 2e-3 (docs/calibration.md).
PUBLISHED_STEPS, MOST_RATE = 2000, 10.0
FORECASTER_LR, ROUTER_LR, LORA_LR = 3e-3, 1e-3, 2e-4
BATCH, LENGTH = 8, 256  # blocks over all processes, where they can share them evenly, of so many tokens
POLISH_LR, POLISH_FORECASTER_LR, POLISH_TEMPERATURE = 2e-3, 1e-3, 0.5


def fit(
    checkpoint: Checkpoint,
    blocks: Blocks,
    options: Options,
    device: torch.device,
    work: Work,
    team: Team,
    report: Reporter,
) -> Fitted:
    """Runs the recipe that settled ``options`` name, and the polish if they ask for one."""
    decoder = Decoder(checkpoint, device)
    aim = _aim(checkpoint, options)
    meter = Meter(decoder, blocks.threshold, options.kv_cache, work, team, report)
    if options.recipe == "local":
        ids = with_foreign(blocks.fit, checkpoint.vocabulary, options.seed)
        fitted = fit_local(decoder, ids, replace(options, sparsity=aim), meter, work, team, report)
    else:
        fitted = _end_to_end(checkpoint, blocks, options, aim, meter, work, team, report)
    if options.polish:
        fitted = polish(fitted, blocks, options, work, team, report)
    return fitted


def _end_to_end(
    checkpoint: Checkpoint,
    blocks: Blocks,
    options: Options,
    aim: float,
    meter: Meter,
    work: Work,
    team: Team,
    report: Reporter,
) -> Fitted:
    from .endtoend import Descent, cut, train_lora, train_paper, uniform_shapes

    decoder, steps, batch = meter.decoder, options.steps, _batch(team)
    rate = min(MOST_RATE, PUBLISHED_STEPS / steps)
    shapes = uniform_shapes(checkpoint.config, *options.shape, options.units)
    ids, micro_batch = cut(blocks.fit, LENGTH), _micro_batch(options)

    def train() -> Result:
        units, _ = train_paper(
            checkpoint,
            ids,
            shapes,
            sparsity=aim,
            kv_cache=options.kv_cache,
            greedy=options.recipe == "greedy",
            forecasters=Descent(steps, batch, FORECASTER_LR * rate, length=128, micro_batch=micro_batch),
            routers=Descent(steps, batch, ROUTER_LR * rate, micro_batch=micro_batch),
            gradient_checkpointing=options.gradient_checkpointing,
            seed=options.seed,
            device=decoder.device,
            report=report,
        )
        return units_to_tensors(units)

    units = units_from_tensors(work.once("endtoend", train))
    scores = _dense_scores(decoder, units, blocks.threshold)
    near = meter.near(units, scores, aim)
    if not options.lora:
        return Fitted(units, decoder, scores, (aim, near))

    def adapt() -> Result:
        descent = Descent(steps, batch, LORA_LR * rate, micro_batch=micro_batch)
        lora, _ = train_lora(
            checkpoint,
            units,
            ids,
            threshold=near,
            kv_cache=options.kv_cache,
            descent=descent,
            gradient_checkpointing=options.gradient_checkpointing,
            seed=options.seed,
            device=decoder.device,
            report=report,
        )
        return {f"{part} {name}": t for name, pair in lora.items() for part, t in zip("ab", pair, strict=True)}

    tensors = work.once("lora", adapt)
    lora = {name[2:]: (tensors[name], tensors["b" + name[1:]]) for name in tensors if name.startswith("a ")}
    decoder = Decoder(checkpoint.with_lora(lora), decoder.device)
    meter = replace(meter, decoder=decoder)
    return Fitted(units, decoder, scores, (aim, meter.near(units, scores, aim, "lora")), lora=lora)


def polish(fitted: Fitted, blocks: Blocks, options: Options, work: Work, team: Team, report: Reporter) -> Fitted:
    """Goes on from a recipe's result with ``options.polish`` end-to-end steps."""
    from .endtoend import Descent, cut, train_polish

    aim = _aim(fitted.decoder.checkpoint, options)
    meter = Meter(fitted.decoder, blocks.threshold, options.kv_cache, work, team, report)
    # The recipe's threshold was measured before its last step; training holds the one it starts at.
    threshold = meter.near(fitted.units, fitted.scores, aim, "refitted")

    ids = with_foreign(blocks.fit, fitted.decoder.checkpoint.vocabulary, options.seed)

    def train() -> Result:
        units, _ = train_polish(
            fitted.decoder.checkpoint,
            fitted.units,
            cut(ids, LENGTH),
            threshold=threshold,
            sparsity=aim,
            kv_cache=options.kv_cache,
            descent=Descent(options.polish, _batch(team), POLISH_LR, micro_batch=_micro_batch(options), average=True),
            forecaster_lr=0.0 if options.recipe == "greedy" else POLISH_FORECASTER_LR,  # greedy forecasts nothing
            temperature=POLISH_TEMPERATURE,
            distil=True,
            gradient_checkpointing=options.gradient_checkpointing,
            seed=options.seed,
            device=fitted.decoder.device,
            report=report,
        )
        return units_to_tensors(units)

    units = units_from_tensors(work.once("polish", train))
    scores = _dense_scores(fitted.decoder, units, blocks.threshold)
    near = meter.near(units, scores, aim, "polished")
    return replace(fitted, units=units, scores=scores, near=(aim, near))


def _aim(checkpoint: Checkpoint, options: Options) -> float:
    """Returns what to fit for: a sparsity of 0 leaves no forecast to fit, so any other within reach will do for it."""
    return options.sparsity or min(0.25, options.budget(checkpoint.config).reachable / 2)


def _batch(team: Team) -> int:
    """Returns how many blocks an end-to-end step takes over all processes: as many for each."""
    return -(-BATCH // team.size) * team.size


def _micro_batch(options: Options) -> int | None:
    """Returns how many blocks an end-to-end stage runs at once in a process; None for all of its share."""
    return 1 if options.gradient_checkpointing else None


@torch.no_grad()
def _dense_scores(decoder: Decoder, units: Units, ids: Tensor) -> dict[Key, Tensor]:
    """Returns the routers' scores ``[tokens]`` on the dense stream of ``ids[blocks, sequence]``, at most 8192 tokens."""
    rows = next(iter(chunks(*ids.shape)))
    x, scores = decoder.embed(ids[rows]).to(decoder.device), {}
    for index, layer in decoder.layers():
        for unit in UNITS:
            h = layer.norm(unit, x)
            if (routed := units.get((index, unit))) is not None:
                scores[index, unit] = routed.to(decoder.device).router(h).flatten().cpu()
            x = x + layer.contribution(unit, x)
    return scores
