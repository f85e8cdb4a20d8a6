"""What every method keeps of 20 seeded images has not changed (tests/golden.py writes the file)."""

import json

import pytest

from tests import contract
from tests.golden import CASES, FILE, all_kept

GOLDEN = json.loads(FILE.read_text()) if FILE.is_file() else {}


@pytest.mark.parametrize("name", [n for n in contract.METHODS if n not in ("full", "downsample")])
def test_keeps_what_it_kept(name, tiny):
    assert name in GOLDEN, f"{name} has no golden indices yet; run python -m tests.golden {name}"
    found = all_kept(tiny, name)
    assert found and all(len(cases) == CASES for cases in found.values())
    assert found == GOLDEN[name]


def test_every_golden_method_is_registered():
    assert set(GOLDEN) <= set(contract.METHODS)
