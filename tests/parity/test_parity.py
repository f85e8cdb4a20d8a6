"""Our methods against recordings of the official code. `bash scripts/test.sh --all` runs every recorded case."""

import pytest

from tests.parity.harness import check, recording, recordings

RECORDINGS = recordings()
FEW = 5
LONGER = [path for path in RECORDINGS if len(recording(path)[1]["cases"]) > FEW]
# Rounding decides the last choices of some cases that were stable where they were recorded, so processors differ:
# CDPruner keeps as many tokens as the features have channels, and a token that PruMerge+ merges has neighbours that are
# equally near. One token (37 of 39 cases whole) and 0.025 of a merged token were seen to differ.
ROUNDED = ("cdpruner-64", "prumerge-plus-64-fixed")
# In a case that is not stable a near tie may swap a few tokens: 4 were seen, at the first stage that differs.
SWAPPED = 6


def check_agreement(path, cases):
    """Of these cases the stable ones keep the very same tokens, the others the same but for near ties."""
    found, rounded = check(path, cases), path.stem in ROUNDED
    if recording(path)[0].get("dtype") == "float64":  # no near ties, and no rounding that layers could enlarge
        assert found.kept == found.tokens_per_layer == found.cases, found
        # SparseVLM divides a cluster by its size and a millionth more; ours is its mean.
        assert max(found.logits, found.step) < (1e-5 if path.stem.startswith("sparsevlm") else 1e-9), found
        return
    assert found.kept_stable >= found.stable - (3 if rounded else 0), found
    assert found.apart <= SWAPPED, found
    assert found.tokens_per_layer == found.cases, found
    # Merged tokens add up float32 numbers in another order; 32 layers enlarge the difference.
    assert found.tokens is None or found.tokens < (5e-2 if rounded else 1e-2), found
    assert found.logits is None or found.logits < (1e-1 if rounded else 6e-2), found
    assert found.step is None or found.step < (1e-1 if rounded else 6e-2), found


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_agrees_with_the_official_code(path):
    check_agreement(path, slice(FEW))


@pytest.mark.slow
@pytest.mark.parametrize("path", LONGER, ids=lambda path: path.stem)
def test_agrees_with_the_official_code_in_all_other_cases(path):
    check_agreement(path, slice(FEW, None))
