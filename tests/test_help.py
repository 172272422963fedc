"""The --help of every script, from its parser."""

import importlib
import shlex
import subprocess
import sys

import pytest
from commands import MODULES, ROOT, SCRIPTS, module_name


def typed(name):
    """Return what a user types after `python`."""
    return f"-m {name}" if "." in name else f"{name}.py"


def parser_of(name):
    parser = importlib.import_module(name).get_args_parser()
    parser.prog = typed(name)
    return parser


def test_every_script_that_can_be_started_has_a_parser():
    started = {module_name(p) for p in MODULES if '__name__ == "__main__"' in p.read_text()}
    assert started == set(SCRIPTS) and len(SCRIPTS) >= 9


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_fits_80_columns_and_ends_with_examples_that_the_parser_accepts(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = parser_of(name).format_help()
    assert max(map(len, text[: text.rindex("example")].splitlines())) <= 80
    heading, *lines = text[text.rindex("example") :].strip().splitlines()
    assert heading in ("example:", "examples:")
    examples = [shlex.split(line.split("&&")[0], comments=True) for line in lines]
    word = typed(name).split()[-1]
    own = [e[e.index(word) + 1 :] for e in examples if word in e]
    assert own
    for argv in own:
        parser_of(name).parse_args(argv)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_in_a_named_group_with_a_text_and_its_default(name):
    parser = parser_of(name)
    grouped = {a for g in parser._action_groups[2:] for a in g._group_actions}
    for action in parser._actions:
        flag = action.option_strings[0]
        if flag in ("-h", "--help"):
            continue
        assert action in grouped, f"{flag} stands under no heading"
        assert action.help, f"{flag} has no text"
        if action.default not in (None, False):
            shown = " ".join(parser._get_formatter()._expand_help(action).split())
            assert f"(default: {action.default})" in shown, flag


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if "." not in name])
def test_every_command_starts_as_typed_and_prints_its_help(name):
    command = [sys.executable, typed(name), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python {name}.py" in done.stdout.split("example", 1)[1]
