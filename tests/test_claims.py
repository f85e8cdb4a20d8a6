"""The ledger of published claims."""

import pytest
import yaml

from eval.efficiency import claims
from eval.efficiency.claims import PAGE, Check, Claim, answer, ledger, read
from eval.efficiency.counts import Computed
from llava.errors import UserError


def test_every_claim_stands_on_the_page():
    page = PAGE.read_text()
    for claim in read():
        line = next(line for line in page.splitlines() if line.startswith(f"| {claim.claim} |"))
        assert f"| {claim.status} |" in line and claim.source in line


ENTRY = {"id": "a", "claim": "c", "source": "s", "trust": "low", "note": "n"}
CHECK = {"shape": "s", "method": "m", "budget": 1}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"status": "empirical"}], "is not a file of claims"),
        ([{"status": "open", "ours": "2 times"}], "is not a file of claims"),
        ([{"status": "proven", "ours": "2 times"}], "is not a file of claims"),
        ([{"status": "empirical", "check": CHECK | {"quantity": "joy"}}], "is not a file of claims"),
        ([{"status": "open"}, {"status": "open"}], "names a twice"),
    ],
)
def test_a_claim_says_what_stands_behind_its_status_and_is_named_once(tmp_path, entries, message):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": [ENTRY | entry for entry in entries]}))
    with pytest.raises(UserError, match=message):
        read(path)


def test_quantities_are_ratios_of_what_was_counted(monkeypatch):
    full, ours = (Computed(f, f, (1,), (kv, kv), 1) for f, kv in ((8 * 10**12, 30 * 10**6), (2 * 10**12, 5 * 10**6)))
    monkeypatch.setattr(claims, "computed_by", lambda shape, method, *_: full if method == "full" else ours)
    found = {quantity: answer(Check(**CHECK, quantity=quantity)) for quantity in claims.QUANTITIES}
    assert found == {"flops": 4, "flops_saved": 75, "tflops": 2, "kv": 6}
    claim = Claim(**ENTRY, status="empirical", check=Check(**CHECK, quantity="flops"))
    assert "4.00 times fewer operations, counted | empirical" in ledger([claim])


@pytest.mark.table
def test_visiondrop_at_320_of_2880_has_the_published_reduction_of_operations():
    """6 times in the abstract; counted at full depth on the meta device."""
    claim = next(claim for claim in read() if claim.id == "visiondrop-next-flops")
    assert claim.check is not None and claim.published == 6.0
    assert 6.0 <= answer(claim.check) < 7.0
