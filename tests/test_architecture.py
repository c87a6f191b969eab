"""The house's rules about itself: imports point down, YAML and functions match."""

import ast
from pathlib import Path

import pytest

import vidtrain

PACKAGE = Path(vidtrain.__file__).parent

# What a part may import of ours. A part is a folder or a file right under vidtrain/.
MAY_IMPORT = {
    "types": set(),
    "sweep": {"types"},
    "config": {"types", "sweep"},
    "provenance": {"data"},
    "trace": {"types", "trace"},
    "layers": {"types", "layers"},
    "losses": {"types", "losses"},
    "metrics": {"types", "metrics"},
    "optim": {"types", "layers", "optim"},
    "data": {"types", "data"},
    "models": {"types", "layers", "models"},
    "weights": {"types", "layers", "weights"},
    "tasks": {"types", "losses", "metrics", "tasks"},
    "visualize": {"types", "data", "visualize"},
    "callbacks": {"types", "data", "tasks", "trace", "visualize", "callbacks"},
    "loggers": {"types", "sweep"},
    "build": {
        "types",
        "config",
        "data",
        "callbacks",
        "tasks",
        "optim",
        "weights",
        "parallel",
        "recompute",
    },
    "recompute": {"types", "layers"},
    "parallel": {"types", "layers", "callbacks", "tasks"},
    "checkpoint": {"types", "config", "build", "provenance", "tasks"},
    "resume": {"types", "config", "checkpoint"},
    "cli": {"config", "commands"},
    "__main__": {"cli"},
    "__init__": set(),
}


def imports(path: Path) -> set[str]:
    """List the parts of vidtrain that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "vidtrain" and len(parts) > 1 and parts[1] != "__version__":
                found.add(parts[1])
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "commands":
        return
    assert imports(path) <= MAY_IMPORT[part], f"{path} imports {imports(path) - MAY_IMPORT[part]}"


def test_one_architecture_does_not_import_another():
    for path in (PACKAGE / "models").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("vidtrain.models"), path


def test_init_files_are_empty():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert not path.read_text(), path


def test_instantiate_is_called_in_one_file():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "build.py":
            assert "hydra.utils.instantiate" not in path.read_text(), path
