"""The tokenizer beside what is written: the base model's files, read as the base model's folder is."""

import json
from pathlib import Path

from ir_convert.checkpoint import Checkpoint
from ir_convert.errors import UserError

# Version 5 of transformers reads tokenizer.json as it is in these families, whatever class their folders name.
TOKENIZED_AS_IS = ("granite", "mistral", "olmo2", "olmo3", "phi3")


def name_class(checkpoint: Checkpoint, folder: Path) -> None:
    """Names the class of a copied tokenizer: transformers would choose one by the model type, which is another here.

    Args:
        checkpoint: the base model.
        folder: where its tokenizer's files have been copied to.
    """
    path = folder / "tokenizer_config.json"
    if not (path.is_file() or (folder / "tokenizer.json").is_file()):
        return
    values = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    try:
        values["tokenizer_class"] = type(checkpoint.tokenizer).__name__
    except UserError:  # it needs code or a package that is not here
        if not values.get("tokenizer_class"):
            raise
    as_is = (folder / "tokenizer.json").is_file() and checkpoint.config.model_type in TOKENIZED_AS_IS
    if as_is or values["tokenizer_class"] == "TokenizersBackend":
        # Version 5 of transformers calls it TokenizersBackend and reads either name; version 4 knows only this one.
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])  # version 4 adds token_type_ids
    values.pop("auto_map", None)  # names code that does not come along
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
