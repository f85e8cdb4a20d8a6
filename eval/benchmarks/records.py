"""Records in question files, each checked once where its file is read, and Excel files with answers.

A schema is a `TypedDict`, so that a checked record is still the dictionary that the file holds. Fields that the schema
does not name pass unchecked, as nothing looks at them. Types are strict: the text "3" is no number, a number no text.

    class Line(TypedDict):
        question_id: Id
        text: Filled
        category: NotRequired[str]
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar
from typing import NotRequired as NotRequired

from pydantic import Field, TypeAdapter, ValidationError

# From typing_extensions, as pydantic asks for before Python 3.12.
from typing_extensions import TypedDict as TypedDict

from eval.answers.jsonl import read_json, read_jsonl
from llava.errors import UserError

Record = TypeVar("Record", bound=Mapping[str, Any])

# An id beyond this length is a mistake; as a number it would also be more than int() takes.
LONGEST_ID = 200

# A text that has to say something.
Filled = Annotated[str, Field(min_length=1)]
Id = (
    Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
    | Annotated[int, Field(ge=-(10**LONGEST_ID), le=10**LONGEST_ID)]
)
# A number that means one.
Number = int | Annotated[float, Field(allow_inf_nan=False)]
# At least one text.
Texts = Annotated[list[str], Field(min_length=1)]

# What pydantic calls a wrong type -> what this module calls the right one.
EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "string_too_short": "a text that is not empty",
    "string_too_long": f"at most {LONGEST_ID} characters",
    "too_short": "a list that is not empty",
}
SHOWN = 60


@cache
def adapter(schema: type) -> TypeAdapter[Any]:
    """The checker of a schema, built once."""
    return TypeAdapter(schema)


def check(schema: type[Record], record: Any, where: str) -> Record:
    """The record, which has every field of the schema in its type; a UserError that starts with `where` otherwise."""
    try:
        checked: Record = adapter(schema).validate_python(record, strict=True, extra="allow")
        return checked
    except ValidationError as error:
        raise UserError(sentence(error, record, where)) from error


def sentence(error: ValidationError, record: Any, where: str) -> str:
    """What is wrong with a record: fields that are absent, null or empty first, else the first wrong type."""
    if not isinstance(record, Mapping):
        return f"{where} should be an object with fields, got {shown(record)}."
    problems = error.errors(include_url=False)
    names = [str(problem["loc"][0]) for problem in problems]
    if lost := [name for name in dict.fromkeys(names) if record.get(name) in (None, "")]:
        return f"{where} has no {' and no '.join(lost)}."
    first = problems[0]
    place = place_of(record, first["loc"])
    if first["type"] == "missing":
        return f"{where} has no {path_of([*place, first['loc'][-1]])}."
    # The members of a union are refused one by one, in the same place.
    same = [problem for problem in problems if place_of(record, problem["loc"]) == place]
    wanted = " or ".join(dict.fromkeys(map(expected, same)))
    return f"{where} should have {wanted} as {path_of(place)}, got {shown(first['input'])}."


def place_of(record: Any, parts: Iterable[Any]) -> list[Any]:
    """Keys and indices that lead to a value; the parts that pydantic adds for members of a union are left out."""
    place = []
    for part in parts:
        if (isinstance(record, Mapping) and part in record) or (isinstance(record, list) and isinstance(part, int)):
            record = record[part]
            place.append(part)
    return place


def path_of(names: Sequence[Any]) -> str:
    """ "types.structural", "answers[3]"."""
    text = ""
    for name in names:
        text += f"[{name}]" if isinstance(name, int) else f".{name}" if text else str(name)
    return text


def expected(problem: Mapping[str, Any]) -> str:
    """The type that a field should have, in words."""
    if problem["type"] == "literal_error":
        return str(problem["ctx"]["expected"])
    if problem["type"].startswith(("less_than", "greater_than")):
        return f"a number of at most {LONGEST_ID} digits"
    return EXPECTED.get(problem["type"], str(problem["msg"]))


def shown(value: Any) -> str:
    """A value for an error, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # a number with more digits than Python prints
        text = "a number with too many digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def columns_of(schema: type[Record]) -> tuple[list[str], list[str]]:
    """Names of the required and of the optional fields, in the schema's order."""
    required = schema.__required_keys__  # type: ignore[attr-defined]
    names = list(schema.__annotations__)
    return [name for name in names if name in required], [name for name in names if name not in required]


def check_all(schema: type[Record], records: Iterable[tuple[str, Any]]) -> list[Record]:
    """(where, record) pairs -> the records, checked."""
    return [check(schema, record, where) for where, record in records]


def check_lines(path: Path, schema: type[Record]) -> list[tuple[str, Record]]:
    """("FILE line N", record) of a JSON-lines file that holds at least one."""
    records = []
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        records.append((where, check(schema, row, where)))
    if not records:
        raise UserError(f"{path} holds no questions.")
    return records


def check_list(path: Path, schema: type[Record], key: str | None = None) -> list[Record]:
    """A list of records: the whole JSON document, or what stands under `key`."""
    document = read_json(path)
    records = document.get(key) if key is not None and isinstance(document, dict) else document
    if not isinstance(records, list) or not records:
        place = f"a list under {key!r}" if key is not None else "a list"
        raise UserError(f"{path} should hold {place} with at least one entry.")
    return check_all(schema, ((f"{path} entry {number}", record) for number, record in enumerate(records, start=1)))


def check_map(path: Path, schema: type[Record]) -> dict[str, Record]:
    """A map from question id to record with at least one entry."""
    document = read_json(path)
    if not isinstance(document, dict) or not document:
        raise UserError(f"{path} should map question ids to questions and hold at least one.")
    return {name: check(schema, record, f"Question {name} in {path}") for name, record in document.items()}


# -- the Excel files that MMBench's server and MMStar's script read ----------------------------------------------------


def write_xlsx(columns: Sequence[str], rows: Iterable[Sequence[str | int | None]]) -> bytes:
    """One sheet with a line of column names, as pandas' to_excel without an index writes it.

    Differs from it: text is always text, also where it starts with "=", which a spreadsheet would compute.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def cell(value: str | int | None) -> WriteOnlyCell:
        text = isinstance(value, str)
        made = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value) if text else value)
        if text:
            made.data_type = "s"
        return made

    sheet.append([cell(name) for name in columns])
    for row in rows:
        sheet.append([cell(value) for value in row])
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()
