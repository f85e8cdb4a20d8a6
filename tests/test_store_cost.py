"""The benchmark of the answer store runs, and its numbers are what it says they are."""

from eval.answers import index_answers
from eval.answers.jsonl import read_jsonl
from eval.efficiency import store_cost


def test_a_paced_run_stores_every_question_and_its_share_is_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(store_cost, "QUESTIONS", 24)
    part = store_cost.share(tmp_path / "o", 8, 0.001)
    assert 0 < part < 1
    rows = [row for _, row in read_jsonl(tmp_path / "o" / "answers.jsonl")]
    assert len(index_answers(tmp_path, rows, [str(number) for number in range(24)])) == 24


def test_the_command_prints_one_line_for_each_batch_size_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store_cost, "QUESTIONS", 48)
    assert store_cost.main(["--milliseconds", "1", "--answers", "1500"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(store_cost.BATCHES) + 1 and lines[-1].startswith("opening 1,500 answers: ")
    assert list(tmp_path.iterdir()) == []
