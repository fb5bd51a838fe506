"""Imports point one way: no import cycles, and no import from a lower room into a higher one."""

import ast
import graphlib
from pathlib import Path

from conftest import ROOT

from train_gpt import TOOLS

# Each room may import from itself and from these.
ALLOWED = {
    "script": set(),
    "cpu": set(),
    "tools": {"script", "cpu"},
    "models": {"script"},
    "data": {"script", "tools"},
    "records": {"script", "tools"},
    "experiments": {"script", "tools", "records"},
    "ladders": {"script", "tools", "records", "experiments"},
}
ROOMS = {
    "script": ["train_gpt.py"],
    "cpu": ["tools/cpu/*.py"],
    "tools": ["tools/*.py"],
    "models": ["records/models/*.py"],
    "data": ["data/*.py"],
    "records": ["tools/records/*.py"],
    "experiments": ["tools/experiments/*.py"],
    "ladders": ["records/ladders/*/*.py"],
}
LOADERS = ("tool", "sibling")  # functions that load a module by its name


def files() -> dict[Path, str]:
    """{file: room}."""
    return {path: room for room, patterns in ROOMS.items() for pattern in patterns for path in ROOT.glob(pattern)}


def loaded_names(tree: ast.AST) -> set[str]:
    """The modules that a file imports, or loads through the table of tools or as a sibling of a model file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in LOADERS:
                names.add(Path(node.args[0].value).name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("record_"):
            names.add(node.value)  # record.py dispatches by name
    return names


def graph() -> dict[Path, set[Path]]:
    """{file: the files of this repository that it imports}, except those the script loads through its table."""
    rooms, edges = files(), {}
    for path in rooms:
        names = set() if rooms[path] == "script" else loaded_names(ast.parse(path.read_text(encoding="utf-8")))
        found = {other for other in rooms if other.stem in names and other != path}
        # run.py and model.py of a ladder: a bare name is a file in the same folder if one exists.
        local = {other.stem for other in found if other.parent == path.parent}
        edges[path] = {other for other in found if other.parent == path.parent or other.stem not in local}
    return edges


def test_imports_have_no_circle():
    edges = graph()
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError
    assert sum(map(len, edges.values())) > 60, "or the imports are not found"


def test_imports_point_one_way():
    rooms = files()
    wrong = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path, others in graph().items()
        for other in others
        if rooms[other] not in ALLOWED[rooms[path]] | {rooms[path]}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_script_reaches_tools_only_through_its_table():
    tree = ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    others = {path.stem for path in files()} - {"train_gpt"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & others
    loaded = loaded_names(tree) & others
    assert loaded == TOOLS.keys()
    assert all((ROOT / "tools" / f"{name}.py").is_file() for name in TOOLS)
