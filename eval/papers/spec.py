"""The specification of a table: a YAML file of specs/PAPER/, or a user's own.

`read` checks a file before anything runs: unknown keys, methods, options and benchmarks are errors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from eval import benchmarks
from eval.config import FULL
from eval.papers import published
from eval.papers.published import Convention
from eval.yaml_files import Part, first_problem, read_yaml
from llava.budget import BLIND, WITHOUT_BUDGET, count_or_ratio
from llava.errors import UserError, suggestion, unknown
from llava.places import PACKAGES
from llava.reduction import registry
from llava.reduction.reducer import options_of

SPECS = PACKAGES / "eval" / "papers" / "specs"
LISTS = SPECS / "lists"


def accepted_by(check: Callable[[Any], object]) -> AfterValidator:
    """A field whose value `check` accepts without raising an error."""

    def validate(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(validate)


def published_method(name: str) -> str:
    """ "none", "", a method, or another method that only published rows have."""
    known = ("none", *registry.names(), *published.OTHER_METHODS)
    if name and not set(name.split("+")) <= set(known):
        raise unknown("method of published values", name, known)
    return name


def published_column(name: str) -> str:
    if name and name not in published.COLUMNS:
        raise unknown("column of published values", name, published.COLUMNS)
    return name


# A number of tokens, or a ratio such as "1/9".
Budget = Annotated[int | str, accepted_by(count_or_ratio)]


class Place(Part):
    """A model and its data.

    Attributes:
        model: hub id of the checkpoint, or folder of a bundled toy model.
        data: folder of a bundled toy data set; empty for real data, whose folder the user names.
        benchmarks: the columns that it can fill; empty for all.
        tokens: visual tokens of an image without reduction, as the paper counts them.
        image_options: how images are read, such as the paper's convention of tiles.
        convention: one of eval.papers.published.CONVENTIONS; published numbers under another one are not compared.
        dtype: of the weights.
        batch_size: questions asked at once.
        questions: of each benchmark at most; None for all.
    """

    model: str
    data: str = ""
    benchmarks: tuple[str, ...] = ()
    tokens: int = 576
    image_options: Mapping[str, str] = Field(default_factory=dict)
    convention: Convention = "unknown"
    dtype: str = "float32"
    batch_size: int = 8
    questions: int | None = None


class Column(Part):
    """A benchmark as the paper reports it.

    Attributes:
        title: head of the column.
        metric: name in the result's metrics; "" for the benchmark's main number.
        published: name of the column in the published values; "" if no source has it.
        tolerance: how far the unreduced model may be from the published baseline, in points of the metric.
        split: "" for the benchmark's default.
        published_split: the split of the published values, if it is another one; no difference is shown then.
    """

    benchmark: Annotated[str, accepted_by(benchmarks.check_name)]
    title: str
    metric: str = ""
    published: Annotated[str, AfterValidator(published_column)] = ""
    tolerance: float = 0.5
    split: str = ""
    published_split: str = ""

    @model_validator(mode="after")
    def check(self) -> "Column":
        if self.split:
            benchmarks.check_split(benchmarks.get(self.benchmark), self.split)
        return self


class TableRow(Part):
    """A method of the table.

    Attributes:
        label: "" for the method's name.
        published: name in the published values; "" for the method's name, "none" for a variant of our own. Numbers
            made by the authors' release belong to the row that runs it (`runs_release`).
        group: heading above the first row of a group; in an ablation the factor.
        claim: a sentence that holds if the defaults of the paper's method are significantly better than this row.
        against: title of another row of a score table, which a section of the page subtracts from this one.
    """

    method: Annotated[str, accepted_by(registry.method)]
    label: str = ""
    options: Mapping[str, str] = Field(default_factory=dict)
    published: Annotated[str, AfterValidator(published_method)] = ""
    group: str = ""
    claim: str = ""
    against: str = ""

    @property
    def title(self) -> str:
        return self.label or self.method

    @property
    def published_name(self) -> str:
        return "" if self.published == "none" else self.published or self.method

    @property
    def runs_release(self) -> bool:
        """Whether the row does what the authors' release does: no difference is known, or option `official` is set."""
        return "official" not in options_of(registry.method(self.method)) or (
            self.options.get("official", "").lower() == "true"
        )


class Table(Part):
    """One table of a paper.

    Attributes:
        title: heading of the page.
        about: what the paper's table shows, and what is known about it.
        paper: folder that the spec is in.
        name: of the file.
        kind: "scores": methods by benchmarks; "ablation": one method's options, compared with its defaults;
            "efficiency": costs and times; "overview": methods by budgets on one benchmark, and tests of all pairs.
        ours: the paper's method, which the others are compared with.
        real: the checkpoint of the paper; toy: what stands in for it without downloads.
        model_title: name of the paper's model.
        published: file of eval/papers/published/; "" if there is none.
        others: methods of that file that have no row and are shown as reported; None for all.
        budgets: visual tokens, or retention ratios.
        notes: conventions and known deviations.
        page: the page of the documentation into which `--page` writes the sections; "" for none.
    """

    title: str
    about: str
    paper: str
    name: str
    kind: Literal["scores", "ablation", "efficiency", "overview"] = "scores"
    ours: Annotated[str, accepted_by(registry.method)]
    model_title: str
    real: Place
    toy: Place
    published: str = ""
    others: tuple[Annotated[str, AfterValidator(published_method)], ...] | None = None
    columns: tuple[Column, ...]
    budgets: tuple[Budget, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()
    page: str = ""

    @model_validator(mode="after")
    def check(self) -> "Table":
        """Check names and options that only make sense together."""
        if self.published:
            published.check_model(self.published)
        names = [column.benchmark + column.split for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError("a benchmark is listed twice under columns")
        for place in (self.real, self.toy):
            if lost := [name for name in place.benchmarks if name not in {c.benchmark for c in self.columns}]:
                raise ValueError(f"{place.model} lists benchmarks that are no column: {', '.join(lost)}")
        for row in self.rows:
            if row.method == FULL:
                raise ValueError("full is always the first row; leave it out of rows")
            registry.build(row.method, None if row.method == BLIND else 1, dict(row.options))
            if row.against and self.kind != "scores":
                raise ValueError(f"against: {row.against} is for tables of the kind scores")
            if row.against and row.against not in (titles := [other.title for other in self.rows if other is not row]):
                raise unknown(f"row that {row.title} is set against", row.against, titles)
        keys = [(row.method, tuple(sorted(row.options.items()))) for row in self.rows]
        if self.kind == "overview" and len(self.columns) > 1:
            raise ValueError("an overview is of one benchmark; leave one under columns")
        if self.kind != "ablation" and len(set(keys)) < len(keys):
            raise ValueError("a method with the same options is listed twice under rows")
        return self

    @property
    def script(self) -> str:
        return f"scripts/{self.paper}/{self.name}.sh"

    @property
    def identity(self) -> str:
        """Name among all tables: "consensusdrop/llava15_7b"."""
        return f"{self.paper}/{self.name}"


def read(path: Path) -> Table:
    """Read and check the specification of a table.

    Raises:
        UserError: no such file, no YAML, or something in it is wrong; the sentence names the place.
    """
    if not path.is_file():
        hint = suggestion(path.stem, [other.stem for other in paths()])
        name = short(path) if path.is_relative_to(SPECS) else path
        raise UserError(f"There is no table {name}.{hint} Tables: {', '.join(sorted(map(short, paths())))}.")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} should be a mapping of keys to values, got {type(content).__name__}.")
    try:
        return Table.model_validate(
            {"paper": path.resolve().parent.name, "name": path.stem} | resolved(content, path.parent)
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None


def resolved(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The content of a spec with its lists put in.

    `rows: ../lists/baselines.yaml` stands for the list in that file, which is looked for relative to the spec and then
    in specs/lists. `rows: all` stands for all methods.
    """
    found = dict(content)
    for key in ("rows", "columns"):
        value = found.get(key)
        parts = value if isinstance(value, list) else [value]
        entries: list[Any] = []
        for part in parts:
            if part == "all" and key == "rows":
                entries += [{"method": method} for method in registry.names() if method not in WITHOUT_BUDGET]
            elif isinstance(part, str):
                places = [folder / part, LISTS / Path(part).name]
                file = next((place for place in places if place.suffix == ".yaml" and place.is_file()), None)
                if file is None:
                    raise UserError(
                        f"{key} names {part}, which is no .yaml file beside the table's nor one of specs/lists."
                    )
                listed = read_yaml(file)
                if not isinstance(listed, list):
                    raise UserError(f"{key} names {part}, which should hold a list, got {type(listed).__name__}.")
                entries += listed
            elif part is not None:
                entries.append(part)
        found[key] = entries
    if "factors" in found:
        found["rows"] = [*found["rows"], *rows_of_factors(str(found.get("ours", "")), found.pop("factors"))]
    return found


def rows_of_factors(method: str, factors: Any) -> list[dict[str, Any]]:
    """The rows of an ablation: the defaults, then every choice of every factor.

    Args:
        factors: title -> {option: [values]} or a list of {option: value}.
    """
    if not isinstance(factors, dict):
        raise UserError("factors should map a title to the choices of an option.")
    rows: list[dict[str, Any]] = [{"method": method, "label": "defaults", "published": "none"}]
    for title, choices in factors.items():
        if isinstance(choices, dict):
            choices = [{option: value} for option, values in choices.items() for value in values]
        for options in choices:
            label = ", ".join(f"{option} {value}" for option, value in options.items())
            rows.append({"method": method, "group": title, "label": label, "options": options, "published": "none"})
    return rows


def paths() -> list[Path]:
    """The specs of all tables: of this repository's papers, and of any folder that a user adds to specs/."""
    return sorted(path for path in SPECS.glob("*/*.yaml") if path.parent != LISTS)


def short(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def find(name: str) -> Path:
    """The spec that a command line names: a path, or "consensusdrop/llava15_7b"."""
    path = Path(name)
    return path if path.suffix == ".yaml" else SPECS / path.with_suffix(".yaml")


def chosen(entries: Sequence[Any], wanted: Sequence[str], what: str, names: Sequence[str]) -> Iterator[Any]:
    """The entries whose names the user listed, or all if none is listed.

    Raises:
        UserError: the table has no entry of a listed name.
    """
    for name in wanted:
        if name not in names:
            hint = suggestion(name, names)
            raise UserError(f"The table has no {what} {name!r}.{hint} It has: {', '.join(dict.fromkeys(names))}.")
    return (entry for entry, name in zip(entries, names, strict=True) if not wanted or name in wanted)
