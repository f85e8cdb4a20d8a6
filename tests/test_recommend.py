"""`vtr recommend`: the halving against a slow reference and on simulated tables, and the command with a fake model."""

import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from eval import benchmarks
from eval.__main__ import main as evaluate
from eval.benchmarks import own
from eval.recommend import command
from eval.recommend.halving import halve, plan, upper_bound
from lab.bench.recommend import SPREAD, Counted, choices, simulated
from llava.errors import UserError
from tests import eval_fakes

# -- the decision ------------------------------------------------------------------------------------------------------


def slow_bound(lost, asked, level):
    """The upper bound from its definition in docs/statistics.md, without arrays."""
    worst = max(range(len(lost)), key=lambda one: lost[one] / asked[one])
    from_mean = [row - sum(lost) / sum(asked) * questions for row, questions in zip(lost, asked, strict=True)]
    square = sum(one**2 for one in from_mean)
    double = 2 if asked[worst] > 8 and (not square or square**2 / sum(one**4 for one in from_mean) < 6) else 1
    rows = [*zip(lost, asked, strict=True), (min(max(lost[worst], 0) * double, asked[worst]), asked[worst])]
    total = sum(questions for _, questions in rows)
    loss = sum(row for row, _ in rows) / total
    shares = [(row - loss * questions) / total for row, questions in rows]
    square = sum(share**2 for share in shares)
    deciding = square**2 / sum(share**4 for share in shares) if square else 0
    if deciding < 3:
        losing = sum(row > 0 for row in lost)
        exact = stats.binomtest(losing, len(lost), alternative="less").proportion_ci(level).high
        return 100 * max(sum(lost) / sum(asked), exact)
    freedom = 2 / (1 / deciding - 1 / len(rows))
    return 100 * (loss + stats.t.ppf(level, freedom) * math.sqrt(square * len(rows) / (len(rows) - 1)))


def slow_choice(lost, asked, costs, full_cost, tolerated, level):
    """Successive halving as docs/statistics.md describes it."""
    running = [one for one in range(len(lost)) if costs[one] < full_cost]
    for share in (8, 4, 2):
        pictures = -(-len(asked) // share)
        known = {one: (lost[one][:pictures], asked[:pictures]) for one in running}
        loss = {one: 100 * sum(row) / sum(number) for one, (row, number) in known.items()}
        not_worse = [one for one in running if -slow_bound(-known[one][0], known[one][1], 0.9) <= tolerated]
        best = sorted(not_worse, key=lambda one: (loss[one] > tolerated, costs[one]))
        safest = min(running, key=lambda one: (slow_bound(*known[one], 0.9), costs[one]))
        running = sorted({safest, *best[: (len(best) + 1) // 2]})
    corrected = 1 - (1 - level) / len(lost)
    passed = [one for one in running if slow_bound(lost[one], asked, corrected) <= tolerated]
    return min(passed, key=lambda one: costs[one], default=None)


def test_halving_is_the_slow_reference():
    random, chosen = np.random.default_rng(0), []
    for _ in range(40):
        lost = simulated(random, SPREAD, (90, 8, 0.96, 0.02, 0.1))
        asked, costs = random.integers(8, 12, 90).astype(float), random.permutation(16).astype(float)
        found = halve(Counted(lost, asked), asked, costs, 14, 3.0, 0.95).chosen
        assert found == slow_choice(lost, asked, costs, 14, 3.0, 0.95)
        chosen.append(found)
    assert len(set(chosen)) > 4 and None in chosen  # so that the comparison means something


def test_the_bound_is_the_slow_reference_and_exact_without_a_loss():
    """200 questions without a loss bound it at 1.5 points, and 299 at 1."""
    assert upper_bound(np.zeros(200), np.ones(200), 0.95) == pytest.approx(100 * (1 - 0.05 ** (1 / 200)))
    assert upper_bound(np.zeros(298), np.ones(298), 0.95) > 1 > upper_bound(np.zeros(299), np.ones(299), 0.95)
    random = np.random.default_rng(1)
    for pictures in (5, 30, 200):
        lost, asked = random.integers(-2, 4, pictures) * 1.0, random.integers(4, 9, pictures) * 1.0
        for level in (0.9, 0.997):
            assert upper_bound(lost, asked, level) == pytest.approx(slow_bound(lost, asked, level))


@pytest.mark.parametrize(
    "losses, setting",
    [
        (SPREAD, (100, 8, 0.96, 0.0, 0.0)),
        ([2.1] * 16, (100, 8, 0.96, 0.0, 0.0)),
        ([2.1] * 16, (50, 20, 0.9, 0.0, 0.2)),
    ],
)
def test_fewer_than_5_percent_of_recommendations_lose_too_much(losses, setting):
    """Also where every configuration loses a little more than is tolerated, the worst case.

    In the last setting few pictures lose anything, but much: 17 % went wrong when the worst was only counted twice.
    """
    found = [one.chosen for one in choices(losses, setting, 150)]
    assert sum(one is not None and losses[one] > 2 for one in found) <= 0.05 * 150
    assert losses is not SPREAD or sum(one is not None for one in found) > 30


def test_the_safest_configuration_is_always_kept():
    """Without it, cheap configurations that look good on few pictures leave nothing that passes."""
    lost = np.zeros((8, 160))
    lost[:7, 30:] = np.arange(130) % 7 == 0  # the cheap ones lose nothing on the first pictures
    lost[7, :3] = [-1, -1, -1]
    asked = np.ones(160)
    choice = halve(Counted(lost, asked), asked, np.arange(8.0), 100, 5.0, 0.95)
    assert choice.chosen == 7 and all(7 in look.kept for look in choice.looks)


def test_configurations_that_cost_no_less_than_full_are_not_asked():
    table = Counted(np.zeros((2, 400)), np.ones(400))
    assert halve(table, table.asked, [5.0, 4.0], 5.0, 2.0, 0.95).chosen == 1 and table.seen[0] == 0
    assert halve(table, table.asked, [5.0, 6.0], 5.0, 2.0, 0.95).chosen is None


def test_what_a_number_of_questions_can_show():
    """2.5 sqrt(p D / n) for one comparison, and 6.2 p D / loss^2 questions."""
    lost, alone = np.array([1.0, -1, 1] + [0] * 60), np.arange(63)
    found = plan([np.ones(63), lost], alone, 1000, 1, 2.0, 0.95)
    assert found.changed == 4 / 64 and found.design == 1
    assert found.shown == pytest.approx(100 * 2.4865 * math.sqrt(4 / 64 / 1000), rel=1e-3)
    assert found.needed == pytest.approx(6.183 * 4 / 64 * 50**2, rel=1e-3)
    together = plan([np.repeat([1.0, 0, 0, 0, 0, 0, 0], 9)], np.repeat(range(7), 9), 1000, 1, 2.0, 0.95)
    assert together.design == pytest.approx(9)
    assert plan([lost], alone, 1000, 16, 2.0, 0.95).needed > 1.9 * found.needed


# -- questions of one's own -------------------------------------------------------------------------------------------


def write_questions(folder, pictures=24, per=4, **changes):
    """A file of questions; `changes` go to the third line, where None takes a key out."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(pictures):
        Image.new("RGB", (32, 32), (5 * number, 90, 200)).save(folder / f"{number}.png")
        for one in range(per):
            name = f"{number}-{one}"
            answer = eval_fakes.fake_text(name).rstrip(".").lower()
            rows.append({"id": name, "image": f"{number}.png", "question": "What is it?", "answer": [answer, "it"]})
    rows[2] = {key: value for key, value in (rows[2] | changes).items() if value is not None}
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_of_ones_own_are_read_and_scored(tmp_path):
    path = write_questions(tmp_path, options=["cup", "hat"], answer="B", id=None)
    data = benchmarks.get(str(path)).load(tmp_path, "all")
    first, third = data.questions[0], data.questions[2]
    assert first.message == f"What is it?\n{own.SHORT}" and first.id == "0-0"
    assert third.message == f"What is it?\nA. cup\nB. hat\n{own.LETTER}" and third.id == "3"
    assert data.sample_score(first, "It.") == 1 and data.sample_score(first, "cup") == 0
    assert [data.sample_score(third, text) for text in ("B", "(B) hat", "A")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"answer": None}, r"mine\.jsonl line 3 has no answer\."),
        ({"answer": " "}, r"line 3 has an empty answer"),
        ({"answer": 7}, r"line 3 should have .* as answer, got 7"),
        ({"anwser": "x"}, r"line 3: Unknown key 'anwser'\. Did you mean 'answer'"),
        ({"image": "no.png"}, r"line 3 names the image no\.png, which is not in"),
        ({"image": "../a.png"}, r"line 3 names the image .* not inside"),
        ({"id": "0-1"}, r"line 3 asks question 0-1 a second time"),
        ({"options": ["a", "b"], "answer": "C"}, r"line 3 has answer 'C', expected a letter of its options: A, B"),
        ({"options": list("abcdefghijk"), "answer": "A"}, r"line 3 has 11 options, expected at most 10"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, changes, sentence):
    path = write_questions(tmp_path, **changes)
    with pytest.raises(UserError, match=sentence):
        benchmarks.get(str(path)).load(tmp_path, "all")


def test_a_benchmark_of_ones_own_is_evaluated_like_any_other(tiny_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--benchmark", str(write_questions(tmp_path, 2)), "--method", "full", "--model", str(tiny_path)]
    assert evaluate([*words, "--device", "cpu", "--wandb", "disabled"]) == 0
    assert "mine" in capsys.readouterr().out
    assert len(list((tmp_path / "results").rglob("answers.jsonl"))) == 1


# -- the command -------------------------------------------------------------------------------------------------------


class Lossy(eval_fakes.FakeLlava):
    """Answers the wrong thing for a share of the questions that depends on the budget; costs what it keeps."""

    def __init__(self, wrong=(40, 0, 0), broken=False, **more):
        super().__init__(**more)
        self.wrong, self.broken = dict(zip((8, 16, 32), wrong, strict=True)), broken  # percent by budget

    def expect(self, reducers):
        pass

    def answer(self, samples, reducer, max_new_tokens=128):
        batch = super().answer(samples, reducer, max_new_tokens)
        wrong = self.wrong.get(reducer.budget, 0)
        lost = {one.id for one in samples if zlib.crc32(f"lost {one.id}".encode()) % 100 < wrong}
        answers = tuple(replace(one, text="oh") if one.id in lost or self.broken else one for one in batch.answers)
        batch.operations.alone["prefill"] *= reducer.budget
        return replace(batch, answers=answers)


@pytest.fixture
def recommend(tmp_path, monkeypatch, capsys):
    """The command in a folder of its own: recommend(model, *words, **changes of a line) -> exit code, JSON, errors."""
    monkeypatch.setattr(command, "generate", eval_fakes.generate)

    def run(model, *words, folder="a", pictures=40, **changes):
        path = write_questions(tmp_path / "data", pictures, **changes)
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(command, "load_model", lambda config: model)
        usual = [str(path), "--method", "uniform", "--budget", "8,16,32", "--loss", "20", "--device", "cpu"]
        code = command.main([*usual, *words, "--json"])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if code == 0 else None, printed.err

    return run


def test_the_cheapest_that_keeps_the_loss_is_recommended(recommend, tmp_path):
    code, record, err = recommend(Lossy())
    assert code == 0 and "160 questions about 40 pictures" in err and "can show a loss of" in err
    rows = record["configurations"]
    assert (rows[record["chosen"]]["budget"], rows[record["chosen"]]["loss"]) == ("16", 0)
    assert rows[0]["pictures"] < 40 and rows[0]["loss"] > 20
    assert record["asked"] < record["sweep"] == 640
    assert record["asked"] == len([*lines(tmp_path / "a")])
    html = (tmp_path / "a" / "recommend.html").read_text()
    assert "Recommended: uniform at 16" in html and "with reduce(model" in html


def lines(folder):
    """Every stored answer below a folder."""
    for path in folder.rglob("answers.jsonl"):
        yield from path.read_text().splitlines()


def test_a_stopped_command_goes_on_and_chooses_the_same(recommend, tmp_path):
    """Also where it is stopped while full, the first look or the last test is asked."""
    whole = recommend(model := Lossy())[1]

    def stop(batch):
        if batch == at:
            raise KeyboardInterrupt

    for at in (3, model.batches // 2, model.batches - 2):
        folder = f"stopped{at}"
        code, _, err = recommend(Lossy(before_answer=stop), folder=folder)
        assert code == 130 and "run the same command again" in err
        again = Lossy()
        assert recommend(again, folder=folder)[1] == whole
        assert 0 < len(again.asked) < len(model.asked)
        assert len([*lines(tmp_path / folder)]) == whole["asked"]


def test_nothing_that_passes_names_the_loss_that_is_shown(recommend):
    code, record, _ = recommend(Lossy((40, 30, 30)), "--loss", "1")
    assert code == 0 and record["chosen"] is None
    said = "\n".join(command.sentences(record))
    assert (
        "Recommended: full" in said and "The smallest loss that is shown: uniform at" in said and "reduce(" not in said
    )


@pytest.mark.parametrize(
    ("words", "changes", "sentence"),
    [
        (["--loss", "0"], {}, "--loss should be a number of points above 0 and below 100, such as 2, got '0'."),
        (["--loss", "-1"], {}, "--loss should be a number of points above 0"),
        (["--confidence", "95"], {}, "--confidence should be a probability above 0.5 and below 1, such as 0.95"),
        (["--method", "unifrom"], {}, "Did you mean 'uniform'?"),
        (["--method", "full,uniform"], {}, "leave it out of --method"),
        (["--budget", "8,900"], {}, "--budget should be 1 to 64"),
        ([], {"pictures": 19}, "76 questions about 19 different pictures here, and fewer than 20"),
        (["--limit", "20"], {}, "take a larger --limit"),
        ([], {"anwser": "x"}, "Did you mean 'answer'"),
        (["--page", "."], {}, "--page . is a folder"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(recommend, words, changes, sentence):
    code, _, err = recommend(Lossy(), *words, **changes)
    assert code == 2 and sentence in err and "Traceback" not in err


def test_full_at_the_floor_is_refused(recommend):
    """Wrong labels or a wrong prompt would let every configuration pass."""
    code, _, err = recommend(Lossy(broken=True))
    assert code == 2 and "Full scores 0.0 % on these 160 questions" in err and "labels or the prompt are wrong" in err
