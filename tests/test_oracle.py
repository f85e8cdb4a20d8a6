"""The oracle of a method has as many tokens in every layer and reads nothing of the image."""

import pytest
import torch

from eval.efficiency.oracle import even_places, flat_oracle, oracle_of
from llava.errors import UserError
from llava.pipeline.prefill import prefill
from llava.reduction import registry
from tests.conftest import samples
from tests.test_every_method import reducing


def tokens_of(model, reducer, batch) -> list[tuple[int, ...]]:
    state, record = prefill(model, batch, reducer)
    return [account.tokens_per_layer for account in record.accounting(state)]


@pytest.mark.parametrize("name", registry.names())
def test_as_many_tokens_in_every_layer_as_the_method(name, tiny):
    reducer = reducing(name, tiny)
    assert tokens_of(tiny, oracle_of(reducer, tiny.spec), samples()) == tokens_of(tiny, reducer, samples())


@pytest.mark.parametrize("name", registry.names())
def test_keeps_the_same_places_of_every_image(name, tiny):
    oracle = oracle_of(reducing(name, tiny), tiny.spec)
    _, record = prefill(tiny, samples(5, text_only=()), oracle)
    first, *others = [[step.reduction.kept.tolist() for step in steps] for steps in record.steps]
    assert all(kept == first for kept in others)
    assert not oracle.tower_scores(tiled=True)


def test_the_flat_oracle_has_the_budget_in_every_layer(tiny):
    assert tokens_of(tiny, flat_oracle(5), samples(1)) == [(5,) * len(tiny.llm.layers)]


def test_places_are_evenly_spaced_and_made_once():
    places = even_places(2, 16, 6, torch.device("cpu"))
    assert places.tolist() == [[0, 2, 5, 8, 10, 13]] * 2
    assert even_places(2, 16, 6, torch.device("cpu")) is places


def test_a_method_whose_tokens_depend_on_the_image_has_no_oracle(tiny):
    with pytest.raises(UserError, match="depends on the image"):
        oracle_of(registry.build("trim", 8, {"adaptive": "true"}), tiny.spec)
