"""Both READMEs and docs/: their commands run, or parse, as typed; the page of flags is complete.

Blocks tagged ```bash data, which make the cache, are run, and then those tagged ```bash test in
their order, in a folder that holds the programs, a data set under its published name, and a small
checkpoint where the model hub's id leads; epochs are shortened by one flag. All others are parsed.
"""

import importlib
import re
import shlex
import sys

import flags_page
import pytest
from commands import FOLDERS, ROOT, SCRIPTS
from conftest import save_qwen

from common import arguments

READMES = [ROOT / "README.md", ROOT / "docs" / "README.zh-CN.md"]
PAGES = [READMES[0], *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path):
    """(tag, commands) of each shell block, commands without comments, as lists of words."""
    found = []
    for tag, text in re.findall(
        r"^```bash *(\w*)\n(.*?)^```", path.read_text("utf-8"), re.M | re.S
    ):
        lines = text.replace("\\\n", " ").splitlines()
        words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
        found.append((tag, [w for w in words if w]))
    return found


def flags_of(name):
    """Return the flags of a script, without --help: name → argparse's action."""
    actions = importlib.import_module(name).get_args_parser()._actions
    return {a.option_strings[-1].removeprefix("--"): a for a in actions if a.dest != "help"}


def parsed(command):
    """(script, its arguments) of a command that a user types; fails where there is no such."""
    words = [w for w in command if not re.fullmatch(r"[A-Z]+=.*", w)]
    if words[0] == "./run_tests.sh":
        assert (ROOT / words[0]).exists() and words[1:] in ([], ["--all"])
        return None
    if words[:2] == ["hf", "download"]:  # the hub's own program
        return None
    if words[0] == "./train.sh":  # the flags are train_real_data.py's
        words = ["python", "train_real_data.py", *words[1:]]
    if words[0] == "torchrun":
        assert words[1] == "--nproc_per_node" and words[2].isdigit()
        words = ["python", *words[3:]]
    assert words[0] == "python", words
    if words[1] == "-c":
        return None
    if words[1] == "-m":
        words = words[1:]
    name = words[1].removesuffix(".py")
    if name.startswith("tests/"):
        assert (ROOT / words[1]).exists()
        return None
    assert name in SCRIPTS, words
    parser = importlib.import_module(name).get_args_parser()
    return name, arguments.parse(parser, words[2:])


def test_both_readmes_have_the_same_commands():
    english, chinese = map(blocks, READMES)
    assert english == chinese
    assert {"data", "test"} <= {tag for tag, _ in english}


def test_every_command_of_every_page_is_one_that_the_programs_accept():
    used = set()
    for path in PAGES:
        for _, commands in blocks(path):
            for command in commands:
                if found := parsed(command):
                    used.add(found[0])
    assert used == set(SCRIPTS)


def test_commands_in_running_text_name_files_and_flags_that_exist():
    known = {f"--{name}" for script in SCRIPTS for name in flags_of(script)}
    known |= {"--help", "--all", "--check"}  # ./run_tests.sh --all, examples/into_qwen.py --check
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
        for code in re.findall(r"`([^`\n]+)`", text):
            for word in code.split():
                name = word.strip("():,")
                if name.startswith("--"):
                    assert name in known, f"{path.name}: {code}"
                if re.fullmatch(r"([a-z]+/)?[a-z_]+\.(py|sh)", name):
                    assert (ROOT / name).exists(), f"{path.name}: {code}"
        for target in re.findall(r"\]\(([^)#h][^)#]*)[^)]*\)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_page_of_flags_is_what_the_parsers_say():
    written = flags_page.PAGE.read_text("utf-8")
    assert written == flags_page.page(), "write it anew: python tests/flags_page.py"


def test_the_tagged_blocks_run_as_typed_one_after_another(tiny_data, tmp_path, monkeypatch, capsys):
    for source in [*ROOT.glob("*.py"), *(ROOT / folder for folder in FOLDERS)]:
        (tmp_path / source.name).symlink_to(source)
    (tmp_path / "textVQA_groundingtask_bbox").symlink_to(tiny_data)
    save_qwen(tmp_path / "Qwen" / "Qwen2.5-VL-3B-Instruct", width=160)
    monkeypatch.chdir(tmp_path)
    tagged = sorted((b for b in blocks(READMES[0]) if b[0]), key=lambda b: b[0] != "data")
    for _, commands in tagged:
        for words in commands:
            assert words[0] == "python"
            if words[1] == "-c":
                exec(compile(words[2], "README.md", "exec"), {})
                assert "256, 160])" in capsys.readouterr().out
                continue
            words = words[1:] if words[1] == "-m" else words
            name = words[1].removesuffix(".py")
            shorter = ["--epochs", "1"] if name == "train_real_data" else []
            script = importlib.import_module(name)
            monkeypatch.setattr(sys, "argv", words[1:] + shorter)
            with pytest.raises(SystemExit) as status:
                arguments.run(script.main, script.get_args_parser())
            out, err = capsys.readouterr()
            assert status.value.code == 0, f"{words}: {err}"
            assert "wrote" in out or "--verify" in words
    for made in (
        "results/ResMLP/best_model.pt",
        "results/ResMLP/svd_nn_comparison.png",
        "results/ResMLP/image_0_rank_comparison.png",
        "factors/ResMLP/manifest.json",
        "factors/exact/manifest.json",
        "codecs/tokens.safetensors",
        "results/report.html",
    ):
        assert (tmp_path / made).stat().st_size > 0, made
