"""The storeys of the package, and CONTRIBUTING.md's map of them."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latent_aug"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# Lowest first; those of one storey do not know each other.
STOREYS = (
    ("utils",),
    ("flows",),
    ("images",),
    ("transforms",),
    ("diagnostics", "export"),
    ("training",),
    ("cli",),
)
HEIGHT = {package: height for height, storey in enumerate(STOREYS) for package in storey}
PACKAGES = sorted(HEIGHT)


def imported_modules(path):
    """Modules of ours that one imports, also within its functions, as paths without a suffix."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latent_aug"):
            place = Path(*node.module.split(".")[1:])
            for alias in node.names:
                inside = place / alias.name
                is_module = (PACKAGE / f"{inside}.py").exists() or (PACKAGE / inside).is_dir()
                yield inside if is_module else place


def imports_of(path):
    """The same by module, without the names that `latent_aug/__init__.py` gives."""
    return {place for place in imported_modules(path) if place.parts and place.parts[0] in HEIGHT}


def test_every_module_lives_in_a_storey():
    assert {path.parts[0] for path in MODULES if len(path.parts) > 1} == set(PACKAGES)
    assert {path.name for path in MODULES if len(path.parts) == 1} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", [p for p in MODULES if len(p.parts) > 1], ids=str)
def test_imports_point_down(path):
    own = path.parts[0]
    for other in imports_of(path):
        package = other.parts[0]
        assert other != Path(own), f"{path} imports from its own package, not from a module"
        assert package == own or HEIGHT[package] < HEIGHT[own], f"{path} imports {other}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_of_a_package_import_each_other_in_a_circle(package):
    below = {
        path.stem: {
            place.stem
            for place in imports_of(path)
            if place.parts[0] == package and len(place.parts) > 1
        }
        for path in MODULES
        if path.parts[0] == package and path.name != "__init__.py"
    }
    while free := [name for name, needs in below.items() if not needs & below.keys()]:
        for name in free:
            del below[name]
    assert not below


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_offers(package):
    module = import_module(f"latent_aug.{package}")
    assert module.__all__ == sorted(module.__all__)
    namespace = {}
    exec(f"from latent_aug.{package} import *", namespace)
    assert set(module.__all__) <= namespace.keys()


def test_the_map_names_every_module():
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `latent_aug/")]
    named = [name for cell in cells for name in re.findall(r"`latent_aug/([^`]+)`", cell)]
    inits = [str(path) for path in MODULES if path.name == "__init__.py" and len(path.parts) > 1]
    assert sorted(named) == sorted({str(path) for path in MODULES} - set(inits))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda p: p.name)
def test_what_an_example_imports_of_the_package_exists(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latent_aug"):
            missing = [
                a.name for a in node.names if not hasattr(import_module(node.module), a.name)
            ]
            assert not missing, f"{path} imports {missing} from {node.module}"
