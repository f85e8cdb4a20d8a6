"""The leaderboard: rank intervals, what keeps an entry off the board, foreign entries, and the page in a browser."""

import csv
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from eval import cli
from eval.answers import entries
from eval.answers.kept_indices import Replayed, kept_faults, read_kept
from eval.command import open_dataset
from eval.config import ROOT, RunConfig
from eval.pages import leaderboard
from eval.results.statistics import accuracy_terms, compare, holm
from eval.run import load_model, run
from eval.statistics.ranks import rank_intervals
from llava.pipeline.generate import generate
from llava.reduction import registry
from llava.reduction.states import PromptState
from llava.reduction.token_layout import PatchGrid
from tests.browser import needs_browser, opened, overflow
from tests.eval_fakes import FakeLlava, FakeReducer, write_gqa

EVIL = "<img src=x onerror=\"console.error('run')\">"
COUNT, IMAGES = 250, 25


class Named(FakeReducer):
    """A reducer whose name and share of right answers the test chooses."""

    def __init__(self, name: str, budget: int):
        super().__init__(budget)
        object.__setattr__(self, "name", name)


class Answering(FakeLlava):
    """Answers the question with number n right unless n is in `wrong`; question n is about image n mod IMAGES."""

    fingerprint: ClassVar[Any] = {"weights": "0123abcd"}
    wrong: frozenset[int] = frozenset()

    def answer(self, samples, reducer, max_new_tokens=128):
        batch = super().answer(samples, reducer, max_new_tokens)
        texts = ["wrong" if int(one.id) - 1000 in self.wrong else "right" for one in batch.answers]
        answers = [
            SimpleNamespace(**vars(one) | {"text": text}) for one, text in zip(batch.answers, texts, strict=True)
        ]
        return SimpleNamespace(**vars(batch) | {"answers": tuple(answers)})


def write_data(folder: Path) -> Path:
    """A GQA of 250 questions about 25 images, of which every reference is "right"."""
    data = write_gqa(folder, COUNT, IMAGES)
    path = data / "gqa" / "data" / "testdev_balanced_questions.json"
    for number in range(IMAGES):  # of different content
        colour = (10 * number, 250 - 10 * number, 200)
        Image.new("RGB", (32, 32), colour).save(data / "gqa" / "data" / "images" / f"n{number}.jpg")
    records = json.loads(path.read_text())
    for number, record in enumerate(records.values()):
        record |= {"answer": "right", "imageId": f"n{number % IMAGES}"}
    path.write_text(json.dumps(records))
    lines = (data / "gqa" / "llava_gqa_testdev_balanced.jsonl").read_text().splitlines()
    found = [json.loads(line) | {"image": f"n{number % IMAGES}.jpg"} for number, line in enumerate(lines)]
    text = "".join(json.dumps(line) + "\n" for line in found)
    (data / "gqa" / "llava_gqa_testdev_balanced.jsonl").write_text(text)
    return data


def ask(folder: Path, data: Path, name: str, budget: int, wrong: int | range, **more: Any) -> Path:
    """A finished run of a method that answers some questions wrong."""
    model = Answering()
    model.wrong = frozenset(range(wrong) if isinstance(wrong, int) else wrong)
    config = RunConfig(name, budget, data=data, output=folder, batch_size=50, wandb="disabled", quiet=True, **more)
    run(config, model, Named(name, budget), timed=False)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Data, and runs of full, of two methods that answer equally well, and of a bad one."""
    folder = tmp_path_factory.mktemp("board")
    data = write_data(folder / "data")
    ask(folder / "runs" / "full", data, "full", 64, 10)
    ask(folder / "runs" / "alike", data, "alike", 16, range(5, 25))
    ask(folder / "runs" / "twin", data, "twin", 16, range(10, 30))
    ask(folder / "runs" / "bad", data, "bad", 16, 150)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy of it that a test may change. Source files of fakes are of no commit; one test is about that alone."""
    shutil.copytree(made, tmp_path / "b")
    monkeypatch.setattr(entries, "code_faults", lambda result: [])
    return tmp_path / "b"


def check(place: Path, entry: str | Path = "runs/alike", full: str = "runs/full") -> int:
    return cli.main(["submit", "check", str(place / entry), "--full", str(place / full), "--data", str(place / "data")])


def board(place: Path, *folders: str) -> tuple[list[leaderboard.Model], list[str]]:
    boards, left_out = leaderboard.collect([place / name for name in folders or ["runs"]], str(place / "data"), "auto")
    return leaderboard.models_of(boards), left_out


def edit(path: Path, change: Any) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


# -- ranks ------------------------------------------------------------------------------------------------------------


def slow_ranks(scores: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """From the definition: compare every pair, correct, and count who is better and who is worse."""
    pairs = list(itertools.combinations(scores, 2))
    tests = [compare(scores[a], scores[b]) for a, b in pairs]
    shown = [p <= 0.05 for p in holm([test.p for test in tests])]
    found = {}
    for name in scores:
        better = worse = 0
        for (a, b), test, certain in zip(pairs, tests, shown, strict=True):
            if certain and name in (a, b):
                ahead = test.difference > 0 if name == a else test.difference < 0
                better, worse = better + (not ahead), worse + ahead
        found[name] = (1 + better, len(scores) - worse)
    return found


def test_rank_intervals_are_those_of_the_definition():
    """A sign or an off-by-one would make the worst method the first, or a rank 0."""
    random = np.random.default_rng(0)
    base = random.random(200)
    shares = {"a": 0.9, "b": 0.88, "c": 0.7, "d": 0.5, "e": 0.5}
    scores = {}
    for number, (name, share) in enumerate(shares.items()):
        noise = np.random.default_rng(number).normal(0, 0.05, 200)
        right = {str(i): float(base[i] + noise[i] < share) for i in range(200)}
        scores[name] = accuracy_terms(right, {str(i): str(i // 4) for i in range(200)})
    found = {name: (one.best, one.worst) for name, one in rank_intervals(scores).items()}
    assert found == slow_ranks(scores)
    assert found["a"] == found["b"] == (1, 2) and found["c"] == (3, 3) and found["d"] == found["e"] == (4, 5)
    assert {one.text for one in rank_intervals(scores).values()} == {"1–2", "3", "4–5"}
    assert rank_intervals({"only": scores["a"]})["only"].text == "1"


# -- what keeps an entry off the board --------------------------------------------------------------------------------


def test_a_run_without_faults_enters_and_equal_methods_tie(place, capsys):
    assert check(place) == 0
    assert "can enter the board as native: alike at 16, accuracy 92.0, 16.0 tokens" in capsys.readouterr().out
    (model,), left_out = board(place)
    (ranking,) = model.rankings
    assert left_out == [] and ranking.size == "16"
    cells = [(row.cells["rank"], row.cells["method"], row.cells["score"].split()[0]) for row in ranking.rows]
    assert cells[0] == ("–", "full", "96.0") and cells[3] == ("3", "bad", "40.0")
    assert {cells[1][1], cells[2][1]} == {"alike", "twin"} and cells[1][0] == cells[2][0] == "1–2"
    assert ranking.rows[1].cells["of full"] == "95.8" and ranking.rows[1].cells["tokens entering"] == "16.0"
    assert ranking.rows[1].cells["tokens paid"] == "16.0"
    assert "visual gain kept" not in ranking.heads, "nobody has a number there"


def change_answer(place: Path) -> None:
    path = place / "runs" / "alike" / "answers.jsonl"
    path.write_text(path.read_text().replace('"text": "wrong"', '"text": "right"', 1))


def change_labels(place: Path) -> None:
    path = place / "data" / "gqa" / "data" / "testdev_balanced_questions.json"
    edit(path, lambda records: records["1007"].update(answer="left"))


def change_budget(place: Path) -> None:
    edit(place / "runs" / "alike" / "result.json", lambda result: result.update(budget=8))


def change_count(place: Path) -> None:
    path = place / "runs" / "alike" / "answers.jsonl"
    path.write_text(path.read_text().replace('"entering": [16, 16, 16]', '"entering": [8, 8, 8]', 1))


def change_mean(place: Path) -> None:
    path = place / "runs" / "alike" / "result.json"
    edit(path, lambda result: result["accounting"].update(mean_tokens_per_layer=8.0))


def change_settings(place: Path) -> None:
    path = place / "runs" / "alike" / "result.json"
    edit(path, lambda result: result["settings"].update(max_new_tokens=64))


def drop_answers(place: Path) -> None:
    path = place / "runs" / "alike" / "answers.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[2:]) + "\n")


def change_dtype(place: Path) -> None:
    shutil.rmtree(place / "runs" / "alike")
    ask(place / "runs" / "alike", place / "data", "alike", 16, range(5, 25), dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (change_answer, "scored again, accuracy is 92.4; result.json says 92"),
        (change_dtype, "differs from the board's full in dtype: float32 and bfloat16"),
        (change_budget, "result.json says a budget of 8, the settings of the run 16"),
        (change_count, "the mean of tokens is not that of the layers in 1 answers (1000)"),
        (change_mean, "added up again, mean_tokens_per_layer is 16; result.json says 8"),
        (change_settings, "250 answers are not of the settings in result.json"),
        (drop_answers, "2 of 250 questions have no answer (1000, 1001)"),
    ],
)
def test_a_changed_run_is_refused_and_named(place, capsys, change, fault):
    """Everything that a reader relies on is computed again from the answers' own lines."""
    change(place)
    assert check(place) == 1
    assert fault in capsys.readouterr().err
    (model,), left_out = board(place)
    assert len(left_out) == 1 and "alike" in left_out[0] and fault in left_out[0]
    assert {row.cells["method"] for row in model.rankings[0].rows} == {"full", "twin", "bad"}


def test_all_faults_are_listed_at_once(place, capsys):
    change_mean(place), change_answer(place), change_budget(place)
    assert check(place) == 1
    printed = capsys.readouterr().err
    assert "4 faults." in printed and printed.count("  - ") == 4  # the answer changes two metrics


def test_other_labels_are_refused(place, capsys):
    """The house's labels count; a board whose full was scored with others must be scored anew."""
    change_labels(place)
    assert check(place) == 2
    printed = capsys.readouterr().err
    assert "was scored with other labels" in printed and len(printed.splitlines()) == 1


def test_native_means_the_code_of_a_commit(made, monkeypatch):
    """Every source file is read from the commit that the result names, and hashed again."""
    result = json.loads((made / "runs" / "alike" / "result.json").read_text())
    assert "not that of one commit, but of 'abc+changes'" in entries.code_faults(result | {"commit": "abc+changes"})[0]
    assert "is not in this repository" in entries.code_faults(result | {"commit": "0" * 40})[0]
    code = {"llava/x.py": "a" * 12}
    known = result | {"commit": "1" * 40, "settings": {"code": code, "method_code": {"eval/y.py": "b" * 12}}}
    monkeypatch.setattr(entries, "blobs_of", lambda commit: {"llava/x.py": "blob1", "eval/y.py": "blob2"})
    monkeypatch.setattr(entries, "code_hash", lambda blob, name: {"blob1": "a", "blob2": "b"}[blob] * 12)
    assert entries.code_faults(known) == []
    known["settings"]["code"] = {"llava/x.py": "c" * 12}
    assert entries.code_faults(known) == [f"its code is not that of commit {'1' * 12}: llava/x.py"]


def test_more_tokens_than_the_budget_are_shown_and_not_ranked(place):
    """PruMerge's 64 are 97: a row among those of 64 would say +6.8 points where its own line says +1.6."""
    model = Answering(mean_error=5)
    config = RunConfig("more", 16, data=place / "data", output=place / "runs" / "more", batch_size=50, wandb="disabled")
    run(config, model, Named("more", 16), timed=False)
    (found,), _ = board(place)
    row = found.rankings[0].rows[-1]
    assert row.cells["method"] == "more" and row.cells["rank"] == "–" and row.score.mean == 100
    assert "21.0 tokens enter, 16 were asked for" in row.notes["rank"]


# -- foreign entries --------------------------------------------------------------------------------------------------


def header_of(place: Path, **more: Any) -> dict[str, Any]:
    full = json.loads((place / "runs" / "full" / "result.json").read_text())
    own = {"method": "theirs", "author": "A", "licence": "MIT", "link": "https://example.org", "commit": "abc"}
    return entries.expected_header(full) | own | {"budget": 16, "positions": "renumber"} | more


def write_reported(place: Path, header: dict[str, Any], wrong: int, tokens: float = 16) -> Path:
    folder = place / "runs" / "reported"
    folder.mkdir(parents=True)
    (folder / "reported.json").write_text(json.dumps(header))
    text = ["wrong" if number < wrong else "right" for number in range(COUNT)]
    lines = [{"question_id": f"{1000 + n}", "text": t, "tokens_per_layer": [tokens] * 3} for n, t in enumerate(text)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_reported_entry_is_scored_here_and_comes_last_in_a_tie(place, capsys):
    write_reported(place, header_of(place, score=93.2), 17)
    assert check(place, "runs/reported") == 0 and "as reported: theirs at 16" in capsys.readouterr().out
    (model,), left_out = board(place)
    cells = [(row.cells["rank"], row.cells["method"]) for row in model.rankings[0].rows]
    assert left_out == [] and cells[-1] == ("4", "bad")
    assert cells[3] == ("1–3", "theirs"), "it has the highest score, but natives are not distinguishable from it"
    row = model.rankings[0].rows[3]
    assert row.cells["cost ratio"] == "" and row.cells["badge"] == "reported"


def test_faults_of_a_reported_entry(place, capsys):
    write_reported(place, header_of(place, score=90, dtype="float16", budget=8, labels="x"), 8, tokens=16)
    assert check(place, "runs/reported") == 1
    printed = capsys.readouterr().err
    assert "dtype is 'float16', the board's full has 'float32'" in printed
    assert "claims a score of 90; the house scores 96.8" in printed
    assert "a budget of 8, but 16.0 tokens enter" in printed and "3 faults" in printed
    (place / "runs" / "reported" / "reported.json").write_text('{"method": ""}')
    assert check(place, "runs/reported") == 1 and "reported.json" in capsys.readouterr().err


# The fields of a kept-index header that do not say which tokens are kept.
ANYONES = {
    "method": "a",
    "author": "b",
    "licence": "c",
    "link": "d",
    "commit": "e",
    "budget": 2,
    "positions": "original",
}
ANYONES |= dict.fromkeys(("benchmark", "split", "profile", "source", "questions", "model_files", "dtype"), "x")


def kept_file(path: Path, header: dict[str, Any], lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in [header, *lines]))
    return path


def test_faults_of_a_kept_index_file(tmp_path):
    header = ANYONES | {"tokens": 8, "order": "raster", "weights": "none", "preprocessing": "y"}
    kept = {
        "good": [1, 7],
        "high": [0, 8],
        "twice": [3, 3],
        "down": [5, 2],
        "none": [],
        "foreign": [0],
        "many": [*range(8)],
    }
    lines = [{"question_id": name, "kept": indices} for name, indices in kept.items()]
    found = kept_faults(
        read_kept(kept_file(tmp_path / "k", header, [*lines, lines[0]])), [*set(kept) - {"foreign"}, "gone"]
    )
    assert sorted(re.sub(r"\d+ questions ", "", fault) for fault in found) == sorted([
        "have no line (gone)", "are not among the board's questions (foreign)", "have more than one line (good)",
        "keep no token (none)", "keep indices outside 0 to 7 (high)", "keep a token twice (twice)",
        "keep indices that do not ascend, where the header says raster order (down)",
        "the header says a budget of 2, but the lines keep 2.7 tokens on average",
    ])  # fmt: skip
    assert kept_faults(read_kept(kept_file(tmp_path / "k", header, lines[:1])), ["good"]) == []
    merged = {"question_id": "good", "kept": [1, 7], "into": [-1, 0, 0, 1, 1, 1, 1, 1], "weights": [0.5] * 8}
    assert (
        "where the header says weights"
        in kept_faults(read_kept(kept_file(tmp_path / "k", header, [merged])), ["good"])[0]
    )
    header |= {"weights": "tokens"}
    assert kept_faults(read_kept(kept_file(tmp_path / "k", header, [merged])), ["good"]) == []
    merged["into"][0] = 2
    assert "lack `into`" in kept_faults(read_kept(kept_file(tmp_path / "k", header, [merged])), ["good"])[0]


def test_replaying_keeps_what_each_question_says(tmp_path):
    """The index of a line, not its place in the batch, decides; merged tokens are those of the file."""
    header = ANYONES | {"tokens": 4, "order": "given", "weights": "features", "preprocessing": "y"}
    lines = [
        {"question_id": "q1", "kept": [3, 0], "into": [1, 0, 0, 0], "weights": [1, 0.25, 0.25, 0.5]},
        {"question_id": "q2", "kept": [2], "into": [-1, 0, 0, 0], "weights": [0, 0.5, 0.5, 0]},
    ]
    reducer = Replayed.of(read_kept(kept_file(tmp_path / "k", header, lines)))
    assert reducer.positions == "original" and reducer.deviates("unsorted") and not reducer.keeps_all(2)
    tokens = torch.zeros(2, 4, 3)
    state = PromptState(ids=("q2", "q1"), features=tokens, tokens=tokens, scores={}, layout=PatchGrid(2, 2))
    second, first = reducer.prompt(state)
    assert first.kept.tolist() == [[3, 0]] and second.kept.tolist() == [[2]] and first.encoder_space
    assert first.matrix().tolist() == [[0, 0.25, 0.25, 0.5], [1, 0, 0, 0]]
    with pytest.raises(Exception, match="no line for 'q3'"):
        reducer.prompt(PromptState(ids=("q3",), features=tokens, tokens=tokens, scores={}, layout=PatchGrid(2, 2)))


def block(name: str) -> str:
    """The code block of docs/evaluation.md after a marker."""
    found = re.search(
        rf"<!-- {name} example -->\n```\w+\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL
    )
    assert found
    return found[1]


def test_the_documented_file_replays_a_method_exactly(tmp_path, monkeypatch, capsys):
    """What divprune keeps, written as the documentation says, gives divprune's answers; one other pixel is refused."""
    monkeypatch.chdir(tmp_path)
    shared = {"limit": 8, "wandb": "disabled", "quiet": True}
    model = load_model(RunConfig("full"))
    for method, budget in (("full", None), ("divprune", 64)):
        run(RunConfig(method, budget, output=Path(method), **shared), model, timed=False)
    full = json.loads(Path("full/limit8/result.json").read_text())
    data = open_dataset("gqa", str(RunConfig.data), "testdev", None, "auto")
    reducer, samples = registry.build("divprune", 64), [data.sample(one) for one in data.questions[:8]]
    kept = {one.id: one.trace[0].reduction.kept[0].tolist() for one in generate(model, samples, reducer, 1).answers}
    processor = model.image_processor
    mean, std = (np.array(part).reshape(3, 1, 1) for part in (processor.mean, processor.std))
    pixel_values = processor(samples[0].image)[None].numpy()
    names = {"kept": kept, "pixel_values": pixel_values, "mean": mean, "std": std}
    exec(block("kept-index"), names | {"board": entries.expected_header(full)})
    assert cli.main(["submit", "check", "kept.jsonl", "--full", "full"]) == 0
    assert cli.main(["submit", "replay", "kept.jsonl", "--full", "full", "--output", "again"]) == 0
    lines = (Path(name, "answers.jsonl").read_text().splitlines() for name in ("divprune", "again"))
    answers = [[json.loads(line)["text"] for line in own] for own in lines]
    assert answers[0] == answers[1] and len(answers[0]) == 8
    again = json.loads(Path("again/limit8/result.json").read_text())
    assert again["method"] == "replayed" and again["settings"]["config"]["method"] == "SparseExample"
    pixel_values[0, 0, 100, 100] += 1
    exec(block("kept-index"), names | {"board": entries.expected_header(full)})
    capsys.readouterr()
    assert cli.main(["submit", "replay", "kept.jsonl", "--full", "full", "--output", "other"]) == 1
    assert "preprocessing is" in capsys.readouterr().err and not Path("other").exists()
    header = json.loads(block("reported"))
    assert {name: header.get(name, {}) for name in entries.expected_header(full)} == entries.expected_header(full)


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def page_file(place) -> Path:
    """A page with every badge, a blind run, planted HTML in every foreign text, and an entry that is left out."""
    ask(place / "runs" / "none", place / "data", "none", 16, 180)
    own = dict.fromkeys(("method", "author", "licence"), EVIL) | {"link": "javascript:alert(1)"}
    write_reported(place, header_of(place, score=93.2, **own), 17)
    (place / "runs" / "broken").mkdir()
    (place / "runs" / "broken" / "reported.json").write_text(
        json.dumps({"benchmark": "gqa", "split": "testdev", "x": EVIL})
    )
    (place / "runs" / "half").mkdir()
    (place / "runs" / "half" / "result.json").write_text("{")
    output = place / "page" / "board.html"
    words = ["leaderboard", str(place / "runs"), "--data", str(place / "data"), "--output", str(output)]
    assert cli.main(words) == 0
    return output


def test_foreign_texts_are_escaped_in_page_and_csv(page_file):
    text = page_file.read_text()
    assert EVIL not in text and text.count("&lt;img src=x") >= 3 and 'href="javascript' not in text
    rows = list(csv.DictReader(page_file.with_suffix(".csv").read_text().splitlines()))
    assert {row["badge"] for row in rows} == {"reference", "native", "reported"}
    reported = next(row for row in rows if row["badge"] == "reported")
    assert (reported["best rank"], reported["worst rank"], reported["score"], reported["cost ratio"]) == (
        "1",
        "3",
        "93.20",
        "",
    )
    blind = next(row for row in rows if row["method"] == "none")
    assert blind["badge"] == "reference" and not blind["best rank"]
    kept = {row["method"]: float(row["visual gain kept"].split()[0]) for row in rows if row["visual gain kept"]}
    assert kept["alike"] == pytest.approx(100 * (92 - 28) / (96 - 28), abs=0.05) and kept["none"] == 0
    assert all(row["commit"] and row["dtype"] == "float32" and row["toy"] == "no" for row in rows)
    assert "2 entries are left out" in text and "runs/broken" in text and "runs/half" in text


@needs_browser
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_the_page_fits_every_width_and_is_used_by_keyboard(page_file, width):
    with opened(page_file, (width, 900)) as page:
        wide = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            assert overflow(page) == 0 == page.evaluate(wide)
            assert min(page.evaluate(CONTRASTS)) >= 4.5, scheme
        page.locator("details.how summary").press("Enter")
        assert page.locator("details.how").get_attribute("open") is not None and overflow(page) == 0
        first = "[...document.querySelectorAll('.board tbody tr')].map(row => row.cells[1].innerText.split(/\\s/)[0])"
        before = page.evaluate(first)
        assert before[:2] == ["full", "none"] and before[-1] == "bad"
        if width == 1440:
            page.locator(".board thead button").nth(2).press("Enter")
            assert page.evaluate(first)[:2] == ["none", "bad"], "sorted by score"
        assert page.locator("tr.reported td").first.is_visible() and not page.errors


# Contrast of every text with the background behind it (WCAG 2: relative luminance).
CONTRASTS = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (one) => { while (one) { const c = rgb(getComputedStyle(one).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; one = one.parentElement; } return [255, 255, 255]; };
  const texts = [...document.querySelectorAll("main *")].filter((one) => one.checkVisibility() &&
    [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()));
  return texts.map((one) => { const [a, b] = [light(rgb(getComputedStyle(one).color)), light(behind(one))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); });
}"""
