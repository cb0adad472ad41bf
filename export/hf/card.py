"""The model card: what the checkpoint is, how to load it, what it saves."""

import math

from ir_convert.checkpoint import Checkpoint
from ir_convert.curve import within_reach
from ir_convert.decoder import attention_kernel
from ir_convert.families import UNITS
from ir_convert.routing import Routing


def model_card(checkpoint: Checkpoint, routing: Routing) -> str:
    """Returns the README.md of a checkpoint. The license is the base model's and left to its author."""
    base, most = checkpoint.hub_id, within_reach(routing.curve.sparsity[-1])
    dial = routing.sparsity or math.floor(most * 50) / 100
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{f"base_model: {base}{chr(10)}" if base else ""}tags:
- informed-routing
- ir-convert
---

# {base or "A language model"} with informed routing

For every token, every {_kinds(routing)} of this model is either run or replaced by a cheap forecast of its output.
Asked for: {routing.sparsity:.1%} of the decoder layers' linear FLOPs saved, forecasters and routers paid for
(attention scores, embeddings and the head are not counted).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the repository's name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

model.set_sparsity({dial:g})  # any share up to {most:.3f}; 0 is {_all_units(routing)}
with model.routing_statistics() as seen:
    model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
print(seen.sparsity, seen.decisions)  # shares of FLOPs and of decisions saved
with model.hold_sparsity({dial:g}):  # moves the threshold, where the text drifts from the one it was measured on
    model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=2000)
```

{_figures(routing)}It runs with transformers {_versions(checkpoint)}, `attn_implementation` {_kernels(checkpoint)}. Fine-tuning leaves routers as they are (they
get no gradient), but what they decide moves with the hidden states: `hold_sparsity` holds what is saved.
`DistributedDataParallel` needs `find_unused_parameters=True`, for not every unit runs in every batch.

| sparsity | threshold |
|---|---|
{_curve(routing)}

Measured on held-out text at calibration. `routing.safetensors` holds the calibration itself, for other exports.
"""


def _kinds(routing: Routing) -> str:
    names = {"attention": "attention", "mlp": "MLP"}
    return " and ".join(names[unit] for unit in UNITS if any(kind == unit for _, kind in routing.units)) + " unit"


def _all_units(routing: Routing) -> str:
    return "the adapted model with every unit" if routing.lora else "the dense model"


def _versions(checkpoint: Checkpoint) -> str:
    return "4.57 and 5" if checkpoint.family.transformers == 4 else str(checkpoint.family.transformers)


def _kernels(checkpoint: Checkpoint) -> str:
    return " or ".join(f"`{name}`" for name in dict.fromkeys([attention_kernel(checkpoint.config), "eager"]))


def _figures(routing: Routing) -> str:
    """Returns what the calibration measured on held-out text, or nothing if it did not."""
    if not (test := routing.metadata.get("test")):
        return ""
    # A dial that was moved after the calibration has not been measured again.
    set_to = "" if routing.moved_from is None else f", set to {routing.moved_from:.1%}"
    return f"""| on held-out text{set_to} | dense | routed |
|---|---|---|
| perplexity (per token) | {test["perplexity_dense"]:.2f} | {test["perplexity"]:.2f} |
| KL from dense (nats) | | {test["kl"]:.3f} |
| same most likely token | | {test["agreement"]:.1%} |
| FLOPs saved | | {test["sparsity"]:.1%} |
| decisions approximated | | {test["decisions"]:.1%} |

"""


def _curve(routing: Routing) -> str:
    """Returns the rows of a table of at most 11 points."""
    points = list(zip(routing.curve.sparsity, routing.curve.threshold, strict=True))
    step = max(1, -(-len(points) // 10))
    shown = points[::step] + ([points[-1]] if (len(points) - 1) % step else [])
    return "\n".join(f"| {sparsity:.3f} | {threshold:.4f} |" for sparsity, threshold in shown)
