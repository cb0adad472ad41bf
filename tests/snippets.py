"""The documentation's examples, as code to run."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PROMPT, NEW = "Once upon a time", 32


def snippet(document: str, heading: str) -> str:
    """Returns the one Python block under a heading."""
    sections = re.split(r"^## +", (DOCS / document).read_text("utf-8"), flags=re.MULTILINE)
    (section,) = (section for section in sections if section.splitlines()[0].strip() == heading)
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return code
