"""docs/methods.md holds what the metadata of the methods says."""

from eval.tables import methods as pages


def test_pages_are_up_to_date():
    """A method could be changed or added without its row."""
    text = pages.PAGE.read_text()
    hint = "run `vtr tables methods`"
    assert pages.table() in text and pages.budgets() in text and pages.known_deviations() in text, hint
    assert pages.splits() in text, hint
