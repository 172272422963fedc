"""Every flag of every script, every mistake. The cases come from the parsers: a new flag is tested,
or fails here until its type refuses what it must."""

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

# what is refused of a flag whose value is a name that only the script can judge
WRONG_NAMES = {
    "--arch": "transformer",
    "--device": "tpu",
    "--model": "no/such model",
    "--encoder_id": "my-vit",
    "--metric": "no_such.safetensors",
    "--codec": "no_such.safetensors",
    "--tokens": "no_such.safetensors",
    "--task_head": "depth",
    "--head_model": "no/such model",
    "--out": "a_file/below.safetensors",
}
# refused only by what the data hold: everything fits the type, nothing fits the cache
TOO_MUCH = {
    "--rank": 10**6,
    "--ranks": 10**6,
    "--image_idx": 10**6,
    "--oversample": 10**6,
}


def parser_of(script):
    return importlib.import_module(script).get_args_parser()


def flags_of(script):
    """(flag, action) of a script, without --help."""
    actions = [a for a in parser_of(script)._actions if not isinstance(a, argparse._HelpAction)]
    return [(action.option_strings[0], action) for action in actions]


def numbers_outside(number):
    """Texts that a Number must refuse: of another type, not finite, and out of its bounds."""
    values = ["x", "", "nan", "inf", "-inf", "1e999", "0x10", "1,5", "--"]
    if number.kind is int:
        values += ["1.5", "1e3", str(10**40)]
        step = 1
    else:
        step = 1e-9
    for bound, sign in ((number.at_least, -1), (number.at_most, 1)):
        if bound is not None:
            values.append(str(bound + sign * max(step, abs(bound) * 1e-9 * (number.kind is float))))
    return values + [str(b) for b in (number.above, number.below) if b is not None]


def wrong_values(flag, action):
    """Values that an action must refuse, as argv without the flag; [] is the flag with no value."""
    if action.nargs == 0:
        return [["=1"]]
    wrong = [[""]] if action.nargs != "?" else []
    if action.nargs != "?":
        wrong.append([])
    if action.choices:
        wrong.append(["no such choice"])
    elif isinstance(action.type, arguments.Number):
        wrong += [[value] for value in numbers_outside(action.type)]
        wrong += [[str(TOO_MUCH[flag])]] if flag in TOO_MUCH else []
    elif action.type is arguments.folder:
        wrong += [["a_file"], ["a_file/below"]]
    else:
        assert action.type in (arguments.name, arguments.file), (
            f"{flag}: give it a type that refuses what is wrong"
        )
        assert flag in WRONG_NAMES, f"{flag}: say in WRONG_NAMES what is refused"
        wrong.append([WRONG_NAMES[flag]])
    return wrong


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags with which each script would work, on tiny data: one mistake is added to them."""
    import train_real_data

    work = tmp_path_factory.mktemp("flags")
    cache = tiny.write_cache(work / "cache", tiny.steep_tokens(12))
    data = tiny.write_data_set(work / "images", [tiny.jpeg(i) for i in range(4)])
    where = ["--cache_dir", str(cache), "--results_dir", str(work / "results"), "--device", "cpu"]
    train = [*where, "--rank", "4", "--epochs", "1", "--hidden_dim", "8"]
    args = arguments.parse(
        train_real_data.get_args_parser(), [*train, "--log_dir", str(work / "log")]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train_real_data.main(args)
    known = {
        "experiments.make_demo_data": [],
        "experiments.report": where[2:4],
        "train_real_data": train,
        "extract_features": ["--dataset_dir", str(data), "--device", "cpu"],
    }
    return {
        script: known.get(
            script,
            # of a script that is not named here: those of `where` that it has
            [w for i in (0, 2, 4) if where[i] in dict(flags_of(script)) for w in where[i : i + 2]],
        )
        for script in SCRIPTS
    }


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command line that must be refused; returns the line. Nothing on disk may change."""
    from encoders import checkpoints

    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(checkpoints, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")

    def run(script, argv):
        module = importlib.import_module(script)
        capsys.readouterr()
        with pytest.raises(SystemExit) as status:
            arguments.run(module.main, module.get_args_parser(), argv)
        error = capsys.readouterr().err
        assert status.value.code == 2, (argv, status.value.code, error)
        assert error.startswith("error: ") and error.count("\n") == 1, (argv, error)
        assert [path.name for path in tmp_path.rglob("*")] == ["a_file"], argv
        return error

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_value_of_any_flag_is_one_line_with_the_flag_and_what_is_accepted(
    script, base, refused
):
    for flag, action in flags_of(script):
        rest = base[script]
        if flag in rest:  # typed once only, so that the mistake is the last word
            at = rest.index(flag)
            rest = rest[:at] + rest[at + 2 :]
        for words in wrong_values(flag, action):
            argv = [f"{flag}=1"] if words == ["=1"] else [flag, *words]
            error = refused(script, [*rest, *argv])
            assert flag in error, (argv, error)
            if words == ["=1"] or (flag in TOO_MUCH and words == [str(10**6)]):
                continue
            if isinstance(action.type, arguments.Number):
                assert action.type.accepted in error, (argv, error)
            for choice in (action.choices or ()) if words else ():
                assert choice in error, (argv, error)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_that_does_not_exist_is_refused_and_no_flag_can_be_shortened(script, base, refused):
    assert "--no_such_flag" in refused(script, [*base[script], "--no_such_flag", "1"])
    for flag, action in flags_of(script):
        shortened = flag[:-1]
        if shortened not in dict(flags_of(script)):
            value = [] if action.nargs == 0 else ["1"]
            assert shortened in refused(script, [*base[script], shortened, *value])


def test_a_flag_of_several_scripts_means_the_same_kind_of_value_in_all_of_them():
    for script in SCRIPTS:
        for flag, action in flags_of(script):
            if flag in arguments.SHARED:
                assert action.type is arguments.SHARED[flag][0], (script, flag)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_exclude_each_other_are_refused_together(script, base, refused):
    values = {"--rank": "3", "--target_error": "0.5"}
    values |= {"--step": "2", "--target_kb": "3"}
    for group in parser_of(script)._mutually_exclusive_groups:
        flags = [action.option_strings[0] for action in group._group_actions]
        for first in flags:
            for second in set(flags) - {first}:
                typed = [word for f in (first, second) for word in (f, values[f])]
                error = refused(script, [*base[script], *typed])
                assert first in error and second in error


CONTRADICTIONS = [
    ("train_real_data", "--factors direct --refine_steps 2", "--refine_steps"),
    ("train_real_data", "--factors direct --oversample 2", "--oversample"),
    ("train_real_data", "--use_rank_allocator", "--use_rank_allocator needs --arch AdaLoRA"),
    ("train_real_data", "--arch AdaLoRA --allocator_keep_ratio 0.5", "--allocator_keep_ratio"),
    ("train_real_data", "--arch AdaLoRA --use_rank_allocator", "--epochs"),
    (
        "train_real_data",
        "--arch AdaLoRA --use_rank_allocator --allocator_init_warmup 0 "
        "--allocator_final_warmup 1 --allocator_importance sensitivity",
        "--allocator_importance",
    ),
    ("train_real_data", "--resume --rank 3", "--rank 3"),
    ("train_real_data", "--resume --seed 1", "--seed 1"),
    ("train_real_data", "--resume last --epochs 7", "--epochs 7"),
    ("train_real_data", "--resume --arch MLP", "--arch MLP"),
    ("extract_features", "--demo --model x", "--model"),
    ("extract_features", "--verify --demo", "--dataset_dir does nothing beside --verify"),
    ("factorize", "--verify --rank 3", "--rank"),
    ("factorize", "--exact", "--exact is of coded factors"),
    ("factorize", "--step 2", "--step is of coded factors"),
]


@pytest.mark.parametrize(("script", "flags", "named"), CONTRADICTIONS)
def test_flags_that_contradict_each_other_or_the_run_are_refused_by_name(
    script, flags, named, base, refused
):
    rest = base[script]
    if "--resume" in flags:  # the flags that say what the run has are left away
        rest = rest[:6]
    if script == "factorize":
        rest = []
    if "--verify --demo" in flags:
        rest = rest[:2]
    assert named in refused(script, [*rest, *flags.split()])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_ends_of_every_range_are_accepted(script):
    parser = parser_of(script)
    for flag, action in flags_of(script):
        number = action.type
        if isinstance(number, arguments.Number):
            for end in (number.at_least, number.at_most):
                if end is not None:
                    needed = [w for f, a in flags_of(script) if a.required for w in (f, "x")]
                    values = [str(end)] * (action.nargs if isinstance(action.nargs, int) else 1)
                    args = arguments.parse(parser, [*needed, flag, *values])
                    assert getattr(args, action.dest) in (end, [end] * len(values))


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


def test_a_misspelt_flag_is_answered_with_the_nearest_one(script):
    for typed, meant in (("--epoch", "--epochs"), ("--batchsize", "--batch_size")):
        done = script("train_real_data.py", typed, 1)
        assert done.returncode == 2 and f"{typed} 1; {meant} is one" in done.stderr
