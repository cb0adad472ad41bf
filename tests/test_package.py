"""Every folder with Python files is in the list of packages: editable installs would hide a missing one."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_all_packages_are_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for top in ("ir_convert", "export") for path in (ROOT / top).rglob("*.py")}
    names = {".".join(folder.parts).replace("export", "ir_convert.export", 1) for folder in folders}
    assert names == set(listed)
