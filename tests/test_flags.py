"""Mistakes in typing: each is one line with the flag and what is accepted, and changes nothing."""

import argparse
import contextlib
import importlib
import io
import math
import sys

import pytest
import tiny
from commands import SCRIPTS
from hypothesis import given, settings
from hypothesis import strategies as st

from common import arguments


def parser_of(script):
    return importlib.import_module(script).get_args_parser()


def flags_of(script):
    """(flag, action) of a script, without --help."""
    actions = [a for a in parser_of(script)._actions if not isinstance(a, argparse._HelpAction)]
    return [(action.option_strings[0], action) for action in actions]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a cache, and results of one epoch on it."""
    import train_real_data

    work = tmp_path_factory.mktemp("flags")
    tiny.write_cache(work / "cache", tiny.steep_tokens(12))
    argv = ["--cache_dir", work / "cache", "--results_dir", work / "results", "--log_dir", work]
    argv += "--rank 4 --epochs 1 --hidden_dim 8 --device cpu".split()
    args = arguments.parse(train_real_data.get_args_parser(), [str(word) for word in argv])
    with contextlib.redirect_stdout(io.StringIO()):
        train_real_data.main(args)
    return work


MISTAKES = [  # script, what is typed, what the line says
    ("train_real_data", "--rank 0", "--rank: '0' is not a whole number at least 1"),
    ("train_real_data", "--rank 1000000", "--rank 1000000"),
    ("train_real_data", "--batch_size eight", "--batch_size: 'eight' is not a whole number"),
    ("train_real_data", "--lr nan", "--lr: 'nan' is not a number"),
    ("train_real_data", "--arch transformer", "ResMLP, MLP, AdaLoRA"),
    ("train_real_data", "--results_dir a_file", "a_file"),
    ("train_real_data", "--rank 4 --factors direct --refine_steps 2", "--refine_steps"),
    ("train_real_data", "--use_rank_allocator", "--use_rank_allocator needs --arch AdaLoRA"),
    ("train_real_data", "--resume --rank 3", "--rank 3"),
    ("train_real_data", "--resume --arch MLP", "--arch MLP"),
    ("train_real_data", "--no_such_flag 1", "--no_such_flag"),
    ("train_real_data", "--epoch 1", "--epoch 1; --epochs is one"),
    ("train_real_data", "--batchsize 1", "--batchsize 1; --batch_size is one"),
    ("compare_svd_nn", "--device tpu", "--device"),
    ("visualize_svd_nn", "--image_idx 1000000", "--image_idx"),
    ("factorize", "--rank 3 --target_error 0.5", "--target_error"),
]


@pytest.mark.parametrize(("script", "typed", "said"), MISTAKES)
def test_a_mistake_is_one_line_with_the_flag_and_changes_nothing(
    script, typed, said, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    argv = ["--cache_dir", str(trained / "cache"), "--results_dir", str(trained / "results")]
    module, before = importlib.import_module(script), sorted(trained.rglob("*"))
    with pytest.raises(SystemExit) as status:
        arguments.run(module.main, module.get_args_parser(), [*argv, *typed.split()])
    error = capsys.readouterr().err
    assert status.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert said in error
    assert [path.name for path in tmp_path.rglob("*")] == ["a_file"]
    assert sorted(trained.rglob("*")) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_can_be_shortened(script):
    known = dict(flags_of(script))
    for flag in known:
        if (shortened := flag[:-1]) not in known:
            with contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
                parser_of(script).parse_args([shortened])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_typed_with_hyphens_is_answered_by_the_one_with_underscores(script, capsys):
    """`--target-error` was answered by `--target_kb is one`."""
    for flag, _ in flags_of(script):
        typed = "--" + flag[2:].replace("_", "-")
        if typed != flag:
            with pytest.raises(SystemExit):
                parser_of(script).parse_args([typed, "1"])
            assert f"{flag} is one" in capsys.readouterr().err


bounds = st.none() | st.integers(-(10**6), 10**6)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from((int, float)),
    *[bounds] * 4,
    st.text(max_size=12) | st.floats().map(str) | st.integers(-(10**7), 10**7).map(str),
)
def test_a_number_is_within_its_range_or_refused_whatever_is_typed(
    kind, at_least, at_most, above, below, text
):
    try:
        value = arguments.Number(kind, at_least, at_most, above, below)(text)
    except argparse.ArgumentTypeError as error:
        assert "is not a" in str(error)
        return
    assert type(value) is kind and math.isfinite(value)
    assert (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    assert (above is None or value > above) and (below is None or value < below)


ALL_FLAGS = sorted({flag for script in SCRIPTS for flag, _ in flags_of(script)} - {"--help"})
words = st.sampled_from(ALL_FLAGS) | st.text(max_size=8) | st.integers().map(str)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SCRIPTS), st.lists(words, max_size=6))
def test_any_words_are_parsed_or_refused_in_one_line(script, argv):
    if any(word in ("-h", "--help") or word.startswith("-h") for word in argv):
        return
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            args = arguments.parse(parser_of(script), argv)
        except SystemExit as status:
            assert status.code == 2
            assert errors.getvalue().startswith("error: ") and errors.getvalue().count("\n") == 1
            return
    assert args.typed <= set(vars(args)), sys.argv
