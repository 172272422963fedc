"""docs/flags.md from the parsers: `python tests/flags_page.py` writes it, a test compares it."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from commands import ROOT, SCRIPTS  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
HEAD = """# Every command and its flags

Written by `python tests/flags_page.py` from the parsers; `--help` says the same.
"""


def command(name: str) -> str:
    """Return what a user types for a script: "python x.py", "python -m experiments.x"."""
    return f"python -m {name}" if "." in name else f"python {name}.py"


def default(action: argparse.Action) -> str:
    value = action.default
    if value is None or value is False:
        return ""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def page() -> str:
    """Return the whole page, Markdown."""
    text = HEAD
    for name in sorted(SCRIPTS, key=lambda name: ("." in name, name)):
        parser = importlib.import_module(name).get_args_parser()
        text += f"\n## `{command(name)}`\n\n{parser.description}\n\n"
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            value = default(action)
            words = " ".join((action.help or "").replace("%%", "%").split())
            text += f"- `{action.option_strings[0]}`{f' (`{value}`)' if value else ''}: {words}\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
