"""Our methods against recordings of the official code. `bash scripts/test.sh --slow` runs every recorded case."""

import pytest

from tests.parity.harness import check, recordings

RECORDINGS = recordings()
FEW = 5


def check_agreement(path, cases):
    found = check(path, cases)
    assert found.kept_stable == found.stable, found
    assert found.tokens_per_layer == found.cases, found
    # Merged tokens add up float32 numbers in another order; 32 layers enlarge the difference.
    assert found.tokens is None or found.tokens < 1e-2, found
    assert found.logits is None or found.logits < 6e-2, found
    assert found.step is None or found.step < 6e-2, found


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_agrees_with_the_official_code(path):
    check_agreement(path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_agrees_with_the_official_code_in_every_case(path):
    check_agreement(path, None)
