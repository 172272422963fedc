"""One look for all figures: who draws, in which colours, and what is left alone."""

from __future__ import annotations

import ast
import subprocess
import sys

from commands import MODULES, ROOT

from figures import style


def test_only_the_modules_of_figures_import_matplotlib():
    importers = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "matplotlib" for name in names):
                importers.add(path.parent.name)
    assert importers == {"figures"}


def test_no_two_methods_share_a_colour_or_a_label():
    labels, colours = zip(*style.METHODS.values(), strict=True)
    assert len(set(labels)) == len(set(colours)) == len(style.METHODS)


def test_plots_never_touch_pyplot_and_leave_matplotlibs_settings_alone(tmp_path):
    check = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy(); "
        "from figures import components, style, token_grid; both = [[2.0, 1.0]]; "
        "components.component_energy(sys.argv[1], {'X': both, 'X_hat': both}, [5.0], 'footer'); "
        "assert 'matplotlib.pyplot' not in sys.modules; "
        "assert all(before[key] == matplotlib.rcParams[key] for key in style.STYLE)"
    )
    command = [sys.executable, "-c", check, str(tmp_path / "b.png")]
    subprocess.run(command, check=True, cwd=ROOT)
    assert (tmp_path / "b.png").exists()
