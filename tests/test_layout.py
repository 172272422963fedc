"""Where things live, and who may import whom: what lets a newcomer find a thing by its name."""

import ast
import subprocess

import pytest
from commands import FOLDERS, MODULES, ROOT, module_name

SHARED = {"model", "svd_baseline", "qwenvl_dataloader", "subspace"}
# each may import those to its left; figures only common, and the commands and experiments anything
LAYERS = ["common", "figures", "shared", "features", "task", "training", "coding", "top"]
NAMES = {module_name(path): path for path in MODULES}


def imports(path):
    """Our own modules that a file imports anywhere in it, lazily and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            yield from names & set(NAMES)


def layer(name):
    folder = name.partition(".")[0]
    if "." not in name:
        return "shared" if name in SHARED else "top"
    return "top" if folder == "experiments" else folder


IMPORTS = {name: set(imports(path)) for name, path in NAMES.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_module_imports_only_what_stands_before_it(name):
    own = LAYERS.index(layer(name))
    for other in IMPORTS[name]:
        assert LAYERS.index(layer(other)) <= own, other
        if layer(name) == "shared":
            assert layer(other) != "figures", other
        if layer(other) == "top":  # a command or an experiment is nobody's library
            # but what checks training on a GPU runs it
            checked = name == "experiments.gpu_check" and other == "train_real_data"
            both = other.startswith("experiments.") and name.startswith("experiments.")
            assert both or checked, other


def test_no_modules_import_each_other_in_a_circle():
    left = {name: set(others) for name, others in IMPORTS.items()}
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or importing one: {sorted(left)}"


def test_the_root_holds_at_most_sixteen_files_and_nine_folders():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    paths = [line.split("/") for line in tracked.stdout.splitlines() if line[0] != "."]
    assert len({path[0] for path in paths if len(path) == 1}) <= 16
    folders = {path[0] for path in paths if len(path) > 1}
    assert len(folders) <= 9 and set(FOLDERS) <= folders


def test_no_module_is_longer_than_450_lines():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 450, path
