"""CONTRIBUTING.md's map of the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latent_aug"
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def rows():
    """The row of each module that the map names."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    named = [line.split("|")[1] for line in lines if line.startswith("| `latent_aug/")]
    return {
        name.removeprefix("latent_aug/"): number
        for number, cell in enumerate(named)
        for name in re.findall(r"`([^`]+)`", cell)
    }


def imported(name):
    """Modules of ours that one imports, also within its functions."""
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latent_aug"):
            place = "/".join(node.module.split(".")[1:])
            yield f"{place}.py"
            yield from (f"{place}/{alias.name}.py".lstrip("/") for alias in node.names)


def test_the_map_names_every_module():
    assert sorted(rows()) == [name for name in MODULES if name != "flows/__init__.py"]


@pytest.mark.parametrize("name", sorted(rows()))
def test_imports_point_down(name):
    row = rows()
    assert [other for other in imported(name) if row.get(other, row[name]) < row[name]] == []
