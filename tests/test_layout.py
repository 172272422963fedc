"""Who may import whom: the rules that let a newcomer know where to look."""

import ast

import pytest
from commands import MODULES, module_name

ROOT_MODULES = {"svd_baseline", "qwenvl_dataloader", "model"}
# What each layer may import beside itself. Commands and experiments may import all of them.
MAY_IMPORT = {
    "lowrank_tokens": set(),
    "common": {"lowrank_tokens"},
    "figures": {"lowrank_tokens", "common"},
    "root": {"lowrank_tokens", "common"},
    "encoders": {"lowrank_tokens", "common", "root"},
    "heads": {"lowrank_tokens", "common", "root", "encoders"},
    "training": {"lowrank_tokens", "common", "root", "encoders", "heads", "figures"},
}
NAMES = {module_name(path): path for path in MODULES}


def imports(path):
    """Our own modules that a file imports anywhere in it, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            yield from names & set(NAMES)


def layer(name):
    folder = name.partition(".")[0]
    if "." in name or folder == "lowrank_tokens":
        return folder
    return "root" if name in ROOT_MODULES else "command"


IMPORTS = {name: set(imports(path)) for name, path in NAMES.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_module_imports_only_the_layers_below_its_own(name):
    own = layer(name)
    for other in IMPORTS[name]:
        assert layer(other) != "command", f"{other} is a command, nobody's library"
        if own in MAY_IMPORT:
            assert layer(other) in MAY_IMPORT[own] | {own}, other


def test_no_modules_import_each_other_in_a_circle():
    left = {name: set(others) for name, others in IMPORTS.items()}
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or importing one: {sorted(left)}"
