"""Parts a folder of books into what a reference model is trained on, what calibrates it, and what it is measured on.

    python benchmarks/books.py FOLDER --part test > test.txt

Each book is cut at line ends into pieces of 20 000 characters; of every ten pieces in a row, eight train, one calibrates,
one tests. So calibration and test text is unseen in training, and from the same books.
"""

import argparse
import itertools
import sys
from pathlib import Path

PIECE = 20_000
PARTS = {"calibration": 4, "test": 9}


def books(folder: Path, part: str, pattern: str = "*") -> list[str]:
    """Returns the pieces of one part, ``train``, ``calibration`` or ``test``; neighbouring train pieces are joined."""
    result = []
    for path in sorted(folder.glob(f"{pattern}.txt")):
        run: list[str] = []
        for index, piece in enumerate(_pieces(path.read_text("utf-8"))):
            place = index % 10
            if part == "train":
                if place not in PARTS.values():
                    run.append(piece)
                elif run:
                    result.append("".join(run))
                    run = []
            elif place == PARTS[part]:
                result.append(piece)
        if run:
            result.append("".join(run))
    if not result:
        raise SystemExit(f"no text of part '{part}' in {folder}/{pattern}.txt")
    return result


def _pieces(text: str) -> list[str]:
    cuts = [0]
    while cuts[-1] < len(text):
        end = text.find("\n", cuts[-1] + PIECE) + 1
        cuts.append(end or len(text))
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=["train", *PARTS], required=True)
    parser.add_argument("--books", default="*", help="which, as a file-name pattern")
    args = parser.parse_args()
    sys.stdout.write("\n".join(books(args.folder, args.part, args.books)))
