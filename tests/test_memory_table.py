"""Expected memory of the official models in docs/cluster.md."""

import pytest

from eval.efficiency import memory
from eval.efficiency.shapes import MODELS, official
from eval.tables import memory as page


def test_page_is_current():
    assert page.table() in page.PAGE.read_text(), "run `vtr tables memory`"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("LLaVA-1.5-7B", 7.063),
        ("LLaVA-1.5-13B", 13.351),
        ("LLaVA-NeXT-34B", 34.752),
        ("Qwen2.5-VL-7B", 8.292),
    ],
)
def test_official_models_have_their_official_size(name, billions):
    """The numbers of weights that the hub states for the checkpoints."""
    assert memory.weights(official(name), 1).total / 1e9 == pytest.approx(billions, abs=0.001)


def test_every_model_is_in_the_table_with_its_budgets():
    for name in MODELS:
        tokens = official(name).visual_tokens
        assert f"| {name} | {tokens:,} (all) |" in page.table()
        reduced = page.expected(name, page.BUDGETS[tokens][-1])
        assert reduced.kv_bytes < page.expected(name).kv_bytes
        assert reduced.weights == page.expected(name).weights
