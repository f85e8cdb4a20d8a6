"""A sweep over several real ranks: the same files and scores as in one process."""

import json
import os

import psutil
import pytest

from eval.sweep import CachingLlava, Setting, folder_of, name_of, sweep
from llava.model.builder import load
from tests.eval_fakes import write_gqa

SETTINGS = [
    Setting("full", None),
    Setting("uniform", 4),
    Setting("fastervlm", 4),
    Setting("consensusdrop", 4),
    Setting("random", 4, {"seed": "3"}),
]


@pytest.fixture(scope="module")
def both(tiny_path, tmp_path_factory):
    """Scores and output folders: in one process, on two ranks."""
    folder = tmp_path_factory.mktemp("sweeps")
    data = write_gqa(folder / "data", count=12)
    model = CachingLlava(load(tiny_path))
    found = []
    for ranks in ("", "2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANKS", ranks)
            output = folder / f"out{ranks}"
            found.append(
                (
                    sweep(SETTINGS, model, data, "testdev", output, wandb="disabled"),
                    folder_of(output, model, "gqa", "testdev", SETTINGS[0], data).parent,
                )
            )
    return model, data, found


def test_settings_are_spread_over_ranks_and_score_as_in_one_process(both):
    _, _, ((alone, _), (spread, _)) = both
    assert spread == alone and len(spread) == len(SETTINGS)


def test_every_store_holds_the_same_answers(both):
    model, _, ((_, alone), (_, spread)) = both
    for setting in SETTINGS:
        name = name_of(setting, model.visual_tokens)
        assert (spread / name / "answers.jsonl").read_text() == (alone / name / "answers.jsonl").read_text()
    runs = [json.loads(path.read_text()) for path in sorted(spread.glob("*/result.json"))]
    assert len(runs) == len(SETTINGS) and len({run["started"] for run in runs}) == len(SETTINGS)


def test_nothing_else_is_left(both):
    _, _, ((_, alone), (_, spread)) = both
    assert sorted(path.name for path in spread.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert not [one for one in psutil.Process().children(recursive=True) if "eval.parallel.worker" in one.cmdline()]


def test_a_finished_sweep_starts_no_rank(both, monkeypatch):
    model, data, (_, (spread, output)) = both
    monkeypatch.setenv("RANKS", "2")
    monkeypatch.setattr("eval.sweep.launch", None)
    assert sweep(SETTINGS, model, data, "testdev", output.parent.parent, wandb="disabled") == spread
    assert os.environ["RANKS"] == "2"
