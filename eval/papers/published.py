"""Published scores of the official models, each with its source.

The numbers are in `published/<model>.yaml`. A row is one method at one budget in one source; its other keys are columns
(`COLUMNS`). `disputed` says why a row, or one of its columns, should not be relied on. A number is compared with ours
only if it is like ours in every respect (`Value.obstacle`). All others are shown only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import StrictFloat, ValidationError, model_validator

from eval.config import FULL
from eval.yaml_files import Part, first_problem, read_yaml
from llava.errors import UserError, unknown
from llava.reduction import registry

FOLDER = Path(__file__).parent / "published"

# Percent, except MME's points: perception alone, and perception and cognition together.
BENCHMARKS = (
    "vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mme_sum", "mmbench", "mmbench_cn", "mmvet",
    "seed", "seed_img", "llava_bench", "mmmu", "tgif_qa", "msvd_qa", "msrvtt_qa", "activitynet_qa",
)  # fmt: skip
POINTS = ("mme", "mme_sum")
# In percent of the source's own full model, as printed; sources average in two ways (`Source.average_of`).
AVERAGE = "average"
EFFICIENCY = ("tflops", "latency_ms", "speedup")
COLUMNS = (*BENCHMARKS, AVERAGE, *EFFICIENCY)
# Least and most; percent where nothing is said.
RANGES = {"mme": (0, 2000), "mme_sum": (0, 2800), AVERAGE: (0, 200), **dict.fromkeys(EFFICIENCY, (0, math.inf))}

# Rows without a method of this repository, and their names in tables.
OTHER_METHODS = {
    "fitprune": "FitPrune", "fsr": "FSR", "trio": "TRIO", "trio-no-ve": "TRIO without encoder", "duet-vlm": "DUET-VLM",
    "idpruner": "IDPruner", "twigvlm": "TwigVLM", "text_only": "text alone", "hiprune_text": "HiPrune++",
    "prunesid_dyn": "PruneSID-Dyn",
}  # fmt: skip

Trust = Literal["high", "medium", "low"]
Kind = Literal["authors", "copied", "secondary", "rerun", "ours"]
AverageOf = Literal["ratios", "sums"]
TRUST: tuple[Trust, ...] = ("high", "medium", "low")
Convention = Literal["square", "tiles", "spatial", "2880", "fill", "frames", "native", "lmms-eval", "unknown"]
# conventions.yaml says what these mean.
WORDS: Mapping[str, Any] = read_yaml(Path(__file__).with_name("conventions.yaml"))
KINDS: Mapping[Kind, str] = WORDS["kinds"]
CONVENTIONS: Mapping[Convention, str] = WORDS["conventions"]
SPLITS: Mapping[str, str] = WORDS["splits"]

SAME_TOKENS = Fraction(1, 100)  # 10 % of 2,880 tokens is printed as 288 and as 290


@dataclass(frozen=True)
class Value:
    """One published number.

    Attributes:
        value: in the unit of its column.
        source: the key of the source in the file.
        trust: "high" for authors' own papers or code and for whole tables run again with official code, "medium" for
            copies and values read off figures, "low" for notes of others.
        disputed: why the number should not be relied on; None if nothing is known against it.
        title: of the source.
        kind: who obtained the number (`KINDS`).
        column: one of `COLUMNS`.
        convention: one of `CONVENTIONS`.
        split: the split of the number, if it is not the one of `SPLITS`; else "".
        tokens: as printed: a count, or a share such as "1/5" (Qwen).
    """

    value: float
    source: str
    trust: Trust
    disputed: str | None
    title: str
    kind: Kind
    column: str
    convention: Convention
    split: str
    tokens: int | str

    def obstacle(self, convention: str) -> str:
        """Why this number cannot be compared with one of ours on the usual split; "" if it can.

        Args:
            convention: of our number.
        """
        if self.kind == "ours":
            return "a user's own number"
        if self.disputed:
            return "disputed"
        if self.split:
            return f"of {self.split}" + (f", ours of {SPLITS[self.column]}" if self.column in SPLITS else "")
        if self.convention != convention:
            return f"another convention ({CONVENTIONS[self.convention]})"
        if self.trust == "low":
            return "a source of low trust"
        return ""


class Source(Part):
    """Where rows come from.

    Attributes:
        convention: one of `CONVENTIONS`.
        split: "usual" if every column is of the split of `SPLITS`, "unknown" if the source does not say, or
            column -> split for the columns that differ.
        average_of: how the source averages. "ratios": the mean of the scores in percent of the full model's. "sums":
            the sum of the scores in percent of the full model's sum, with MME divided by 20. None if the average is
            over benchmarks that are not all here.
    """

    title: str
    where: str
    kind: Kind
    trust: Trust
    convention: Convention
    split: Literal["usual", "unknown"] | dict[str, str]
    note: str = ""
    average_of: AverageOf | None = None

    @model_validator(mode="after")
    def check(self) -> "Source":
        if isinstance(self.split, dict) and (wrong := set(self.split) - set(SPLITS)):
            raise ValueError(f"split names {', '.join(sorted(wrong))}, which is no benchmark's column")
        return self

    def split_of(self, column: str) -> str:
        """The split of a column, if it is not the usual one; else ""."""
        if isinstance(self.split, dict):
            return self.split.get(column, "")
        return "" if self.split == "usual" else "a split that the source does not name"


class PublishedRow(Part):
    """One method at one budget in one source. `kind`, `trust` and `note` replace those of the source."""

    method: str
    tokens: int | str
    source: str
    scores: dict[str, StrictFloat]
    kind: Kind | None = None
    trust: Trust | None = None
    note: str | None = None
    disputed: str | dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def gather(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Put the columns, which stand beside the other keys in the file, into `scores`."""
        rest = {key: value for key, value in data.items() if key not in COLUMNS}
        for key in rest:
            if key not in cls.model_fields or key == "scores":
                raise unknown("key or column", str(key), (*COLUMNS, *(set(cls.model_fields) - {"scores"})))
        return rest | {"scores": {key: data[key] for key in COLUMNS if key in data}}

    @model_validator(mode="after")
    def check(self) -> "PublishedRow":
        share(self.tokens)
        if not self.scores:
            raise ValueError(f"the row of {self.method} has no column")
        if isinstance(self.disputed, dict) and (wrong := set(self.disputed) - set(self.scores)):
            raise ValueError(f"disputed names {', '.join(sorted(wrong))}, which the row does not have")
        return self

    @property
    def share(self) -> Fraction:
        """The number of tokens, or the share of them, as a fraction."""
        return share(self.tokens)

    def reason(self, column: str) -> str | None:
        """Why the number of a column is disputed, if it is."""
        return self.disputed.get(column) if isinstance(self.disputed, dict) else self.disputed


class Published(Part):
    """The published scores of one model: a file.

    Attributes:
        model: as papers call it.
        sources: key -> source, in the order of the file.
        rows: in the order of the file.
        name: of the file, such as "llava15_7b".
    """

    model: str
    sources: dict[str, Source]
    rows: tuple[PublishedRow, ...]
    name: str

    @model_validator(mode="after")
    def check(self) -> "Published":
        seen, methods = set(), (*registry.names(), *OTHER_METHODS)
        for number, row in enumerate(self.rows, 1):
            if not set(row.method.split("+")) <= set(methods):  # "holov+restore" is a composition
                raise unknown(f"method of row {number}", row.method, methods)
            for column, value in row.scores.items():
                least, most = RANGES.get(column, (0, 100))
                if not least <= value <= most:
                    raise ValueError(
                        f"row {number}, {row.method} at {row.tokens} tokens of {row.source}: {column} must be {least} "
                        f"to {most}, got {value:g}"
                    )
            if row.source not in self.sources:
                raise ValueError(f"a row of {row.method} names the source {row.source}, which is not listed")
            if (key := (row.method, row.share, row.source)) in seen:
                raise ValueError(f"{row.source} has two rows of {row.method} at {row.tokens} tokens")
            seen.add(key)
        return self

    def values(self, method: str, tokens: int | str | None, column: str) -> list[Value]:
        """All published numbers of a cell, the most trusted first, then in the order of the file; users' own last.

        Args:
            method: name in the registry, a composition, or one of `OTHER_METHODS`.
            tokens: visual tokens, or the share that is kept (Qwen, "1/5"); None for any. Counts within 1 % are
                included. The unreduced model is found whatever its count.
            column: one of `COLUMNS`.

        Raises:
            UserError: there is no such column.
        """
        if column not in COLUMNS:
            raise unknown("column", column, COLUMNS)
        wanted = None if tokens is None else share(tokens)
        rows = [row for row in self.rows if row.method == method and column in row.scores]
        if wanted is not None and method != FULL:
            rows = [row for row in rows if abs(row.share - wanted) <= SAME_TOKENS * max(row.share, wanted)]
        found = [self.value(row, column) for row in rows]
        return sorted(found, key=lambda value: (value.kind == "ours", TRUST.index(value.trust)))

    def full(self, column: str) -> list[Value]:
        """All published numbers of the model without reduction, the most trusted first."""
        return self.values(FULL, None, column)

    def value(self, row: PublishedRow, column: str) -> Value:
        """The number of a row in a column that it has."""
        source = self.sources[row.source]
        return Value(
            value=row.scores[column],
            source=row.source,
            trust=row.trust or source.trust,
            disputed=row.reason(column),
            title=source.title,
            kind=row.kind or source.kind,
            column=column,
            convention=source.convention,
            split=source.split_of(column),
            tokens=row.tokens,
        )


@cache
def load(model: str) -> Published:
    """The published scores of a model.

    Args:
        model: the name of its file, one of `models()`.

    Raises:
        UserError: there is no such file, or it is not in the expected form.
    """
    check_model(model)
    path = FOLDER / f"{model}.yaml"
    try:
        content = read_yaml(path)
        return Published.model_validate({"name": model, **content} if isinstance(content, dict) else content)
    except ValidationError as error:
        raise UserError(f"{path} is not a file of published scores: {first_problem(error)}") from None


def models() -> list[str]:
    """The models that have a file."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def check_model(model: str) -> None:
    """Raise UserError if a model has no file of published scores."""
    if model not in models():
        raise unknown("model with published scores", model, models())


def share(tokens: int | str) -> Fraction:
    """A count of tokens, or a share of them such as "1/5", as a fraction."""
    try:
        return Fraction(tokens)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"Expected a number of tokens or a fraction such as 1/5, got {tokens!r}.") from None
