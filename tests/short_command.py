"""``python -m ir_convert``, but for fits that are short: ``python short_command.py MODEL --out ...``."""

import pytest
from calibrations import shorten

from ir_convert import cli

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        cli.main()
