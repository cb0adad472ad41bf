"""Text that every Python installation carries, cut into parts that never overlap.

- ``train``: the standard library's sources and a third of its documentation topics. The tiny model learns from it.
- ``calibration``: most of the other topics, unseen in training. The demo calibrates on it.
- ``test``: every fourth piece of the other topics (and a few sources), unseen by both. The tests measure on it.

The topics quote one another at length, so paragraphs are deduplicated before the parts are drawn.
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

PARTS = ("train", "calibration", "test")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "lib2to3"}
PIECE = 3000  # characters


def topics(part: str) -> list[str]:
    """Returns the documentation topics of ``part``, as documents."""
    from pydoc_data.topics import topics as pages

    trained: list[str] = []
    unseen: list[str] = []
    seen: set[str] = set()
    for name in sorted(pages):
        fresh = []
        for paragraph in pages[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        document = "\n\n".join(fresh).strip() + "\n"
        if _bucket(name, 6) in (0, 3):
            trained.append(document)
        else:
            unseen += _pieces(document)
    if part == "train":
        return [document for document in trained if document.strip()]
    return [piece for index, piece in enumerate(unseen) if (index % 4 == 3) == (part == "test")]


def sources(part: str) -> list[str]:
    """Returns the standard library's modules of ``part`` (one in 32 is a test module), as documents."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            in_test = _bucket(relative.as_posix(), 32) == 0
            if in_test == (part == "test") and part != "calibration":
                documents.append(path.read_text("utf-8", errors="ignore"))
    return [document for document in documents if document.strip()]


def _pieces(document: str) -> list[str]:
    """Cuts a document between paragraphs into pieces of about ``PIECE`` characters."""
    pieces = [""]
    for paragraph in document.split("\n\n"):
        if len(pieces[-1]) > PIECE:
            pieces.append("")
        pieces[-1] += paragraph + "\n\n"
    return [piece for piece in pieces if piece.strip()]


def _bucket(name: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % buckets


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        sys.exit(f"usage: python {sys.argv[0]} {'|'.join(PARTS)} > FILE")
    sys.stdout.buffer.write("\n\n".join(topics(sys.argv[1])).encode())
