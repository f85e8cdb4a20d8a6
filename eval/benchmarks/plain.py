"""Plain sets: choices or short answers, one image each from a table of the hub, one metric. Each is a file of sets/.

`PlainSet` says what a file may hold, and CONTRIBUTING.md has an example. A set that is asked or scored in a way of its
own is code: hub_sets.py.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from eval.benchmarks import SETS
from eval.benchmarks.base import PROFILES, Benchmark
from eval.benchmarks.hub import HubQuestion, HubSet, Kinds, Upload, letters, option_lines, read_set
from eval.benchmarks.llava_files import as_number
from eval.benchmarks.records import Filled, Id, NotRequired, Texts, TypedDict
from eval.metrics import Score
from eval.metrics.accuracy import percent
from eval.metrics.short_answers import METRICS
from eval.yaml_files import Part, first_problem, read_yaml
from llava.errors import UserError, unknown


def one_of(kind: str, names: Collection[str]) -> AfterValidator:
    """A field that holds one of these names."""

    def validate(name: str) -> str:
        if name not in names:
            raise unknown(kind, name, names)
        return name

    return AfterValidator(validate)


class Split(Part):
    """A split.

    Attributes:
        hub: its name on the hub; "" for the same.
        questions: how many questions published numbers are about; None where nothing is published.
    """

    hub: str = ""
    questions: int | None = None


class Prompt(Part):
    """How a profile asks.

    Attributes:
        suffix: the instruction how to answer, on a line of its own after the question; "" for none.
        max_new_tokens: the longest answer.
    """

    suffix: str = ""
    max_new_tokens: int = 128


class PlainSet(Part):
    """A file of sets/. The benchmark is called as the file is.

    Attributes:
        title: for sentences, "AI2D".
        summary: a sentence for lists of benchmarks.
        licence: of the data.
        published, published_by: what a 7B model reaches, with the metric's name, and who says so.
        blind: as of `eval.benchmarks.base.Benchmark`.
        hub: repositories that hold the table, the newest owner first.
        config: configuration on the hub.
        splits: our name -> the split; the first is the default.
        id: column with the question's id; "" if there is none.
        question: column with the question.
        options: column with the list of options, or the columns [A, B, ...] that hold one each; "" if there are none.
            They follow the question, one on a line.
        answer: column with the answer.
        answer_is: "text"; "texts" for a list of accepted ones; "letter" of the right option; its "index" from 0.
        image: column with the image.
        image_key: columns that together name the image, which several questions share; by default its content does.
        groups: name of a breakdown -> column with the group or groups of a question.
        optional: columns of `groups` and `image_key` that a table may lack.
        parts: name of a further number -> {column: value} of the questions that it is the mean of.
        metric: a name of eval.metrics.short_answers.METRICS.
        main: what the number is called.
        profiles: name -> how it asks; the first is the default.
        upload: the file that a server reads: a list of the column `id`, under its own name, and "answer".
    """

    title: str
    summary: str
    licence: str
    published: str = ""
    published_by: str = ""
    blind: str = ""
    hub: Annotated[tuple[str, ...], Field(min_length=1)]
    config: str | None = None
    splits: Annotated[dict[str, Split], Field(min_length=1)]
    id: str = ""
    question: str = "question"
    options: str | tuple[str, ...] = ""
    answer: str = "answer"
    answer_is: Literal["text", "texts", "letter", "index"] = "text"
    image: str = "image"
    image_key: tuple[str, ...] = ()
    groups: dict[str, str] = Field(default_factory=dict)
    optional: tuple[str, ...] = ()
    parts: dict[str, dict[str, str]] = Field(default_factory=dict)
    metric: Annotated[str, one_of("metric", METRICS)]
    main: str = "accuracy"
    profiles: Annotated[dict[Annotated[str, one_of("profile", PROFILES)], Prompt], Field(min_length=1)]
    upload: Upload | None = None

    @model_validator(mode="after")
    def check(self) -> "PlainSet":
        """What only makes sense together."""
        if self.answer_is == "index" and not self.options:
            raise ValueError("answer_is: index needs options, the column that the index is of")
        if self.upload is not None and not self.id:
            raise ValueError("upload needs id, the column with the ids that the server knows")
        for split in self.upload.splits if self.upload is not None else ():
            if split not in self.splits:
                raise unknown("split under upload", split, self.splits)
        for column in self.optional:
            if column not in (known := (*self.groups.values(), *self.image_key)):
                raise unknown("column under optional", column, known)
        for name, wanted in self.parts.items():
            if len(wanted) != 1:
                raise ValueError(f"the part {name} should name one column and its value, such as type: human_test")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that questions and scores depend on."""
        options = (self.options,) if isinstance(self.options, str) else self.options
        of_parts = (column for wanted in self.parts.values() for column in wanted)
        return tuple(dict.fromkeys(filter(None, (self.id, self.question, *options, self.answer, *of_parts))))

    def row_schema(self) -> Any:
        """The schema of a row: the columns that the file names, with their types."""
        fields: dict[str, Any] = dict.fromkeys(self.groups.values(), str | int | list[str] | None)
        fields |= dict.fromkeys(self.image_key, Id | None)
        fields |= {name: NotRequired[kind] for name, kind in fields.items() if name in self.optional}
        fields |= {column: Filled for wanted in self.parts.values() for column in wanted}
        if isinstance(self.options, str):
            fields |= {self.options: Texts} if self.options else {}
        else:
            fields |= dict.fromkeys(self.options, str | int | float | None)
        fields |= {self.id: Id} if self.id else {}
        answers = {"text": Filled, "texts": list[str] | None, "letter": Filled, "index": Id}
        fields |= {self.question: Filled, self.answer: answers[self.answer_is]}
        return TypedDict("Row", fields)  # type: ignore[operator]

    def ask(self, suffix: str, row: Mapping[str, Any], where: str) -> HubQuestion:
        """The question of a row, with its options on lines of their own."""
        question, answer = row[self.question], row[self.answer]
        listed = row[self.options] if isinstance(self.options, str) and self.options else ()
        if not isinstance(self.options, str):  # a row may have fewer options than another
            listed = [row[column] for column in self.options if row[column] not in (None, "")]
        options = letters(listed)
        if options:
            question = f"{question}\n{option_lines(options)}"
        if self.answer_is == "index":
            index = str(answer)
            if not index.isdecimal() or int(index) >= len(options):
                raise UserError(f"{where} has answer {index!r}, expected an index of its {len(options)} options.")
            answer = list(options)[int(index)]
        elif self.answer_is == "letter" and options and answer not in options:
            raise UserError(f"{where} has answer {answer!r}, expected one of {', '.join(options)}.")
        kinds: dict[str, str | list[str]] = {}
        for title, column in self.groups.items():
            group = row.get(column) or ()
            kinds[title] = [str(one) for one in group] if isinstance(group, list | tuple) else str(group)
        for wanted in self.parts.values():
            for column in wanted:
                kinds.setdefault(column, row[column])
        return HubQuestion(question, suffix, list(answer or ()) if self.answer_is == "texts" else answer, kinds)

    def with_parts(self, score: Score, kinds: Kinds) -> Score:
        """The score with the numbers of `parts`; None where no question of a part was asked."""
        values: dict[str, float | None] = {}
        for name, wanted in self.parts.items():
            ((column, value),) = wanted.items()
            scores = [one for question, one in score.correct.items() if kinds[column][question] == value]
            values[name] = percent(scores) if scores else None
        return replace(score, values=score.values | values)

    def submission(self, records: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
        """The file for the server."""
        assert self.upload is not None
        ids = {name: as_number(str(record[self.id])) for name, record in records.items()}
        return {self.upload.file: [{self.id: ids[name], "answer": text} for name, text in texts.items()]}

    def hub_set(self, prompt: Prompt) -> HubSet:
        """The set as a profile asks it."""
        score = METRICS[self.metric]
        return HubSet(
            title=self.title,
            ids=self.hub,
            schema=self.row_schema(),
            columns=self.columns,
            ask=partial(self.ask, prompt.suffix),
            sample_score=lambda text, answers: score(text, [answers] if isinstance(answers, str) else answers),
            expected={name: split.questions for name, split in self.splits.items()},
            main=self.main,
            finish=self.with_parts,
            config=self.config,
            hub_splits={name: split.hub or name for name, split in self.splits.items()},
            id=self.id,
            image=self.image,
            image_key=self.image_key,
            submission=self.submission if self.upload is not None else None,
            upload=self.upload,
            tokens=prompt.max_new_tokens,
        )


def read(path: Path) -> Benchmark:
    """The benchmark of a file.

    Raises:
        UserError: something in the file is wrong; the sentence names the file and the place.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", path.stem):
        raise UserError(f"{path} should be named in lower-case letters, digits and _, as the benchmark is called.")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} should be a mapping of keys to values, got {type(content).__name__}.")
    try:
        plain = PlainSet.model_validate(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
    profiles = {name: plain.hub_set(prompt) for name, prompt in plain.profiles.items()}
    return Benchmark(
        path.stem,
        plain.summary,
        tuple(plain.splits),
        partial(read_set, profiles),
        tuple(profiles),
        published=plain.published,
        published_by=plain.published_by,
        mirror=plain.hub,
        licence=plain.licence,
        blind=plain.blind,
    )


BENCHMARKS = tuple(map(read, sorted(SETS.glob("*.yaml"))))
