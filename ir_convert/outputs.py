"""Where results go: checked before any work, written whole or not at all."""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from .checkpoint import COPIED, Checkpoint
from .errors import UserError, reason
from .export.hf import CODE
from .files import expanded, size_text
from .model_folder import INDEX, WEIGHTS, shards_of

BESIDE = ("config.json", "genai_config.json", *COPIED)  # an ONNX model, whoever made it
LONGEST = 200  # of a name: most file systems have 255 bytes, and what lies beside an output has its name and more
FOREIGN = {
    ".gguf",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".mlmodel",
    ".tflite",
    ".engine",
    ".json",
    ".jsonl",
    ".txt",
    ".zip",
    ".safetensor",
}


@dataclass(frozen=True)
class Output:
    """One thing that the user asked for.

    Attributes:
        path: what the user named.
        kind: ``onnx`` (a model file and what runtimes need beside it), ``hf`` (a checkpoint folder), ``triton`` (a model's
            folder in Triton's model repository) or ``routing`` (the routing file alone).
    """

    path: Path
    kind: str

    @classmethod
    def parse(cls, path: Path, target: str = "hf") -> "Output":
        """Tells the kind from the name: ``*.onnx``, ``*.safetensors``, else a folder, whose kind is ``target``."""
        path = expanded(path)
        if not _is_text(path.name):
            raise UserError(f"output name {path.name!r} is not UTF-8, as names inside of models are: give another")
        if len(os.fsencode(path.name)) > LONGEST:
            raise UserError(f"output name '{path.name[:20]}...' is longer than {LONGEST} bytes: shorten it")
        suffix = path.suffix.lower()
        if suffix in FOREIGN or path.name.lower() in (".onnx", ".safetensors"):
            raise UserError(f"output '{path}' is of no known kind: name a .onnx file, a .safetensors file or a folder")
        kind = {".onnx": "onnx", ".safetensors": "routing"}.get(suffix, target)
        # A folder is moved into place: where a link points to, for it would move the link.
        return cls(path.resolve() if path.is_symlink() and kind == target else path, kind)

    @property
    def is_folder(self) -> bool:
        return self.kind in ("hf", "triton")

    @property
    def is_onnx(self) -> bool:
        return self.kind in ("onnx", "triton")

    @property
    def routing_file(self) -> Path:
        """Where the output keeps its routing file."""
        if self.kind == "onnx":
            return self.path.with_name(f"{self.path.stem}.routing.safetensors")
        if self.kind == "triton":
            return (self.path / self.model_file).with_suffix(".routing.safetensors")
        return self.path / "routing.safetensors" if self.kind == "hf" else self.path

    @property
    def model_file(self) -> Path:
        """Where an ONNX model lies in the folder that ``write`` fills."""
        return Path("1/model.onnx") if self.kind == "triton" else Path(self.path.name)

    def files(self, checkpoint: Checkpoint) -> list[Path]:
        """Returns what the output puts beside other files of the user's; a folder is one thing."""
        if self.kind != "onnx":
            return [self.path]
        beside = ["config.json", "genai_config.json", *checkpoint.copied]
        names = [*beside, self.routing_file.name, f"{self.path.name}.data", self.path.name]
        return [self.path.parent / name for name in names]

    def is_whole(self, checkpoint: Checkpoint) -> bool:
        """Tells whether the output stands there, and lacks no file without which it is of no use."""
        needed = self.files(checkpoint)
        if self.kind == "hf":
            needed = [self.path / name for name in ("config.json", *CODE, *checkpoint.copied)]
            try:
                shards_of(self.path)  # the weights that it names are there
            except UserError:
                return False
        elif self.kind == "triton":
            model = self.path / self.model_file
            beside = ("config.json", *checkpoint.copied, f"{model.name}.data")
            needed = [self.path / "config.pbtxt", model, *(model.parent / name for name in beside)]
        return all(file.exists() for file in (self.routing_file, *needed))

    def write(self, fill: Callable[[Path], None]) -> int:
        """Has ``fill`` write into a temporary folder beside the output, then moves the result into place.

        Returns:
            The size in bytes.
        """
        partial = self.path.parent / f".{self.path.name}.partial"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
            partial.mkdir()
            fill(partial)
            _let_others_read(partial)
            size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
            if self.is_folder:
                replaced = self.path.parent / f".{self.path.name}.replaced"
                shutil.rmtree(replaced, ignore_errors=True)
                if self.path.exists():
                    self.path.rename(replaced)
                partial.rename(self.path)
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                # The file that the user named goes first and comes last: where it is, the others are, and of its kind.
                self.path.unlink(missing_ok=True)
                for name in BESIDE if self.kind == "onnx" else ():
                    _remove(self.path.parent / name)  # a model's before it may have had more of them
                for file in sorted(partial.iterdir(), key=lambda file: file.name == self.path.name):
                    file.replace(self.path.parent / file.name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {self.path}: {reason(error)}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return size


def check_apart(outputs: list[Output], checkpoint: Checkpoint) -> None:
    """Refuses outputs that collide.

    Raises:
        UserError: two outputs would write one file, or one lies in another or in the base model's folder.
    """
    taken: dict[Path, Path] = {}
    places = {output.path.resolve(): output for output in outputs}
    for output in outputs:
        _check_place(output, checkpoint.path.resolve())
        if around := next((places[parent] for parent in output.path.resolve().parents if parent in places), None):
            raise UserError(f"output '{output.path}' lies in '{around.path}', another output: name another place")
        for file in output.files(checkpoint):
            if (other := taken.setdefault(file.resolve(), output.path)) != output.path or outputs.count(output) > 1:
                raise UserError(
                    f"outputs '{other}' and '{output.path}' would both write {file}: name different folders"
                )


def check_outputs(
    outputs: list[Output], checkpoint: Checkpoint, overwrite: bool, bytes_needed: Callable[[Output], int]
) -> None:
    """Refuses, before any work, outputs that would destroy something or cannot be written.

    Raises:
        UserError: something exists and ``overwrite`` is not set, outputs collide (``check_apart``), a folder to overwrite was not
            written by ir-convert or holds what was not, or the disk is too full.
    """
    check_apart(outputs, checkpoint)
    for output in outputs:
        beside = [output.path.parent / name for name in BESIDE] if output.kind == "onnx" else []
        for file in dict.fromkeys([*beside, *output.files(checkpoint)]):
            if file.exists() and beside and any((file.parent / name).exists() for name in WEIGHTS):
                raise UserError(
                    f"{file.parent} holds another model, whose {file.name} would be lost: name another folder"
                )
            if file.exists() and not overwrite:
                own = "" if file == output.path else f"; {output.path.name} wants a folder that no other model is in"
                raise UserError(f"{file} exists: name another output, or give --overwrite{own}")
        if output.is_folder and output.path.exists() and not _replaceable(output):
            kind = "a checkpoint that ir-convert wrote" if output.kind == "hf" else "a Triton model of version 1 alone"
            raise UserError(f"{output.path} is not {kind}; it is not overwritten: name another output")
        if output.is_folder and output.path.exists() and (others := _others(output)):
            raise UserError(
                f"{output.path} also holds '{others[0]}', which would be lost: move it away, or name another output"
            )
    _check_space(outputs, bytes_needed)


def _replaceable(output: Output) -> bool:
    """Tells whether a folder is of the kind that it will be replaced with, or empty."""
    if not output.path.is_dir():
        return False
    names = {path.name for path in output.path.iterdir()}
    if output.kind == "hf":
        return not names or {"config.json", output.routing_file.name} <= names
    return names in (set(), {"config.pbtxt", "1"})  # another version is not ours to remove


def _others(output: Output) -> list[str]:
    """Returns what lies in a checkpoint's folder and is not of those that ir-convert writes."""
    own = {"README.md", "routing.safetensors", "config.json", "__pycache__", INDEX, *COPIED, *CODE}
    names = [path.name for path in output.path.iterdir()] if output.kind == "hf" else []
    return sorted(
        name for name in names if name not in own and not re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name)
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_text(name: str) -> bool:
    """Tells whether a name is UTF-8: bytes that are not come as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _let_others_read(folder: Path) -> None:
    """Gives files the permissions that new files have; safetensors makes them their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _check_place(output: Output, model: Path) -> None:
    path = output.path.resolve()
    if blocked := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
        raise UserError(f"output '{output.path}' lies below {blocked}, which is a file: name another place")
    if path == model or model in path.parents or path in model.parents:
        raise UserError(
            f"output '{output.path}' and the base model's folder {model} lie in each other: name another place"
        )
    if output.is_folder and path in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"output '{output.path}' is the folder you are in, or around it: name a new one")
    if output.is_folder and path.is_mount():
        raise UserError(
            f"output '{output.path}' is a disk of its own, which cannot be replaced: name a folder inside it"
        )
    if not output.is_folder and path.is_dir():
        raise UserError(f"output '{output.path}' is a folder, a file was expected")


def _check_space(outputs: Iterable[Output], bytes_needed: Callable[[Output], int]) -> None:
    by_disk: dict[int, tuple[int, Path]] = {}
    for output in outputs:
        folder = next(parent for parent in output.path.resolve().parents if parent.exists())
        needed, _ = by_disk.get(folder.stat().st_dev, (0, folder))
        by_disk[folder.stat().st_dev] = needed + bytes_needed(output), folder
    for needed, folder in by_disk.values():
        free = shutil.disk_usage(folder).free
        if free < needed * 1.02:
            raise UserError(f"{folder} has {size_text(free)} free; the outputs need about {size_text(needed)}")
