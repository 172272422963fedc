"""Results of one cache never take the place of another's in silence."""

from common.results import keep_other_caches_results, move_aside
from lowrank_tokens.files import write_json


def test_results_of_another_cache_are_moved_aside_with_their_figures_and_a_note(tmp_path, capsys):
    record = tmp_path / "numbers.json"
    write_json(record, {"cache_sha256": "a", "error": 1})
    for name in ("numbers.png", "other.png"):
        (tmp_path / name).write_text("drawn of a")
    keep_other_caches_results(record, ["num*.png"], "b")
    (previous,) = tmp_path.glob("previous-*")
    assert sorted(p.name for p in previous.iterdir()) == ["numbers.json", "numbers.png"]
    assert [p.name for p in tmp_path.glob("*.*")] == ["other.png"]
    assert str(previous) in capsys.readouterr().out


def test_results_of_the_same_cache_are_replaced_and_damaged_ones_are_kept(tmp_path, capsys):
    record = tmp_path / "numbers.json"
    keep_other_caches_results(record, [], "a")  # there is none yet
    write_json(record, {"cache_sha256": "a"})
    keep_other_caches_results(record, [], "a")
    assert record.exists() and capsys.readouterr().out == ""
    record.write_text("{")
    keep_other_caches_results(record, [], "a")
    assert not record.exists() and len(list(tmp_path.glob("previous-*"))) == 1


def test_two_results_that_are_moved_in_one_second_have_folders_of_their_own(tmp_path):
    for _ in range(2):
        (tmp_path / "x").write_text("")
        move_aside([tmp_path / "x"], tmp_path)
    assert len(list(tmp_path.glob("previous-*"))) == 2
