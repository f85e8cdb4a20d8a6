"""The Excel files that MMBench's server, VLMEvalKit and MMStar's script read."""

import io
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.answers.jsonl import Row
from llava.errors import UserError


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
    return without_times(file.getvalue())


def without_times(data: bytes) -> bytes:
    """The same file without the time at which it was written: equal answers are equal bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "docProps/core.xml":
                content = re.sub(rb"(<dcterms:\w+[^>]*>)[^<]*", rb"\g<1>2000-01-01T00:00:00Z", content)
            target.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # ZipInfo's own date is 1980
    return out.getvalue()


def read_xlsx(path: Path) -> list[Row] | None:
    """Answers in such a file; None if it is no Excel file."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    from openpyxl import load_workbook

    try:
        book = load_workbook(path, read_only=True, data_only=True)
        table = iter(book.worksheets[0].iter_rows(values_only=True))
        names = [str(name).lower() if name is not None else "" for name in next(table, ())]
        rows = list(table)
        book.close()
    # openpyxl lets through whatever its parsers of zip, XML and numbers raise.
    except Exception as error:
        raise UserError(f"{path} is not a readable Excel file ({error}).") from error
    if lost := [name for name in ("index", "prediction") if name not in names]:
        raise UserError(f"{path} should have the columns index and prediction; it has no {' and no '.join(lost)}.")
    index, prediction = names.index("index"), names.index("prediction")
    asked = names.index("question") if "question" in names else None
    answers = []
    for number, row in enumerate(rows, start=2):
        if index >= len(row) or row[index] is None:
            continue
        text = row[prediction] if prediction < len(row) else None
        # Excel keeps whole numbers as 12.0 once somebody has saved the file with it.
        name = row[index]
        name = str(int(name)) if isinstance(name, float) and name.is_integer() else str(name)
        question = row[asked] if asked is not None and asked < len(row) else None
        prompt = None if question is None else str(question)
        answers.append(Row(f"{path} line {number}", name, "" if text is None else str(text), prompt))
    return answers
