"""Is the unreduced model the one of the paper? Checked before any reduced number is believed."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.papers.measured import Cell
from eval.papers.published import Published, Value
from eval.papers.spec import Place

# What moves a baseline, by benchmark; most of these were seen in other evaluations of LLaVA.
CAUSES = {
    "textvqa": "OCR tokens in the prompt: the papers' numbers have them (profile llava); without them ten points less",
    "scienceqa": "unreleased weights: LLaVA-1.5's paper has 66.8, the public checkpoint 69.5",
    "mme": "perception alone or with cognition; two lines in a row must be about one picture",
    "pope": "the version of the random part: 2,910 or 3,000 questions",
    "mmbench": "the split: dev and test differ by two points; answers without a letter go to GPT officially",
    "mmbench_cn": "the split, and the Chinese prompt",
    "mmvet": "the judge: GPT-4's version moves the score by points",
    "vizwiz": "the split: test is graded by a server, val is another set",
    "vqav2": "the split: test-dev is graded by a server, val is another set",
    "seed_img": "images alone, or with videos",
    "tgif_qa": "the judge, and which questions: the first 1,000 are all about actions",
    "msvd_qa": "the judge: its version moves the score by points",
    "msrvtt_qa": "the judge: its version moves the score by points",
    "activitynet_qa": "the judge: its version moves the score by points",
}
EVERYWHERE = (
    "the conversation template (result.json, `settings.conversation`)",
    "the padding of pictures to squares (LLaVA-1.5) or the tile convention (LLaVA-NeXT, --picture)",
    "the version of the data (scripts/data/check.sh)",
    "the number format (--dtype) and the checkpoint",
)


@dataclass(frozen=True)
class Check:
    """One benchmark of the unreduced model beside its published baseline.

    Attributes:
        published: the sources, the most trusted first; empty if there is none.
        difference: ours minus the nearest published value; None if there is none.
    """

    cell: Cell
    published: Sequence[Value]
    difference: float | None
    passed: bool

    @property
    def causes(self) -> list[str]:
        """What to look at first when the check failed."""
        known = CAUSES.get(self.cell.column.benchmark)
        return [*([known] if known else []), *EVERYWHERE]


def check(cells: Sequence[Cell], published: Published, place: Place) -> list[Check]:
    """Compare the unreduced model with the published baselines.

    A check passes if the value is within the column's tolerance of one source: sources differ among themselves. A
    partial run (--limit), a benchmark without a source, or one whose published values are of another split is not
    checked.
    """
    found = []
    for cell in cells:
        values = published.values("full", place.tokens, cell.column.published) if cell.column.published else []
        if not values or cell.questions < cell.available or cell.column.published_split:
            found.append(Check(cell, values, None, True))
            continue
        nearest = min((cell.value - value.value for value in values), key=abs)
        found.append(Check(cell, values, nearest, abs(nearest) <= cell.column.tolerance))
    return found


def sentences(checks: Sequence[Check]) -> list[str]:
    """What the gate found, one line per benchmark that failed, with the likely causes."""
    lines = []
    for one in checks:
        if not one.passed:
            expected = ", ".join(f"{value.value:g} ({value.title})" for value in one.published)
            lines.append(
                f"{one.cell.column.title}: the unreduced model has {one.cell.value:.1f}, published {expected}; that is "
                f"outside the tolerance of {one.cell.column.tolerance:g}. Look at: {'; '.join(one.causes)}."
            )
    return lines
