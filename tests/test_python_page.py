"""docs/python.md: its blocks run in their order, as a reader would type them."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from commands import ROOT


def run_command(line):
    """Run one `python …` line of the page, with the checkout's commands, in the current folder."""
    first, *rest = shlex.split(line)[1:]
    words = [first, *rest] if first == "-m" else [str(ROOT / first), *rest]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_blocks_of_the_python_page_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names = {}
    for language, text in re.findall(r"^```(python|bash)\n(.*?)^```", page, re.M | re.S):
        if language == "python":
            exec(compile(text, "docs/python.md", "exec"), names)
        else:
            for line in text.splitlines():
                run_command(line)
    assert float((names["decoded"] - names["new"]).norm() / names["new"].norm()) <= 0.2
    assert names["a"].shape == (1, 168, 8) and names["b"].shape == (1, 8, 96)
    assert names["batch"].shape == (8, 168, 96)
