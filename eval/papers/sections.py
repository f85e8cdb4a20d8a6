"""The further sections of a table's page, by its kind."""

from collections.abc import Sequence

from eval.papers.document import Section
from eval.papers.measured import Measured
from eval.papers.plan import Where
from eval.papers.spec import Table


def sections_of(table: Table, where: Where, found: Measured) -> Sequence[Section]:
    """Statistics of a score table; the paired differences of an ablation."""
    return ()
