"""Data sets of the hub as lmms-eval reads them: a local copy, or the hub itself when asked for.

    DATA/hub/lmms-lab/POPE/...   as `hf download lmms-lab/POPE --repo-type dataset --local-dir DATA/hub/lmms-lab/POPE`
    the hub's cache              as `hf download lmms-lab/POPE --repo-type dataset`; HF_HOME says where it is

A copy below DATA/hub comes first, then the snapshot of the branch main in the cache. A set that also exists as official
files is read from the cache with `--source mirror` only, since nobody has put it into DATA.

The sets moved from one owner to another in 2026; copies under either name are found. Nothing of a data set is
executed: its tables are read by the `datasets` library, its images as bytes.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from eval.answers.jsonl import is_file
from eval.benchmarks.base import Contents, Dataset, Question, Reference, no_submission
from eval.benchmarks.media import Inline
from eval.benchmarks.records import Record, check_all, columns_of
from eval.metrics import Score, first_names
from eval.metrics.accuracy import mean_score
from eval.yaml_files import Part
from llava.errors import UserError, how_to_get, suggestion
from llava.file_state import file_state

# A part of a table: number and count of the parts. Some names end with a hash.
PART = re.compile(r"(?P<table>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\b")


@dataclass(frozen=True)
class HubTable:
    """One split of a data set.

    Attributes:
        id: of the repository, "lmms-lab/POPE".
        where: the local copy or the hub's address, for sentences.
        rows: datasets.Dataset whose images are not decoded.
    """

    id: str
    where: str
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def records(self, schema: type[Record]) -> list[Record]:
        """The rows without their images, checked.

        Args:
            schema: its required fields are the columns that have to be there, its optional ones are left out of the
                rows where the table has no such column.
        """
        required, optional = columns_of(schema)
        names = [*required, *(name for name in optional if name in self.rows.column_names)]
        rows = self._select(names)
        return check_all(schema, ((f"{self.where} row {number}", row) for number, row in enumerate(rows)))

    def fingerprint(self, columns: Sequence[str]) -> str:
        """Hash of these columns' contents."""
        text = json.dumps(self._select(columns), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise UserError if the table lacks one of these columns."""
        if lost := [name for name in columns if name not in self.rows.column_names]:
            there = self.rows.column_names
            hint = suggestion(lost[0], there)
            raise UserError(f"{self.where} has no column {', '.join(lost)}; it has {', '.join(there)}.{hint}")

    def _select(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        self.check_columns(columns)
        rows: list[dict[str, Any]] = self.rows.select_columns(list(columns)).to_list()
        return rows

    def images(self, columns: Sequence[str] = ("image",)) -> Inline:
        """Images named "ROW/COLUMN", or "ROW/COLUMN/NUMBER" where a cell is a list of them."""
        names: set[str] = set()
        for column in (name for name in columns if name in self.rows.column_names):
            names |= cell_names(self.rows.data.column(column), column)
        return Inline(self.where, frozenset(names), self._bytes)

    def row_images(self) -> list[str]:
        """The name of each row's image."""
        return [f"{row}/image" for row in range(len(self))]

    def contents(
        self,
        questions: Iterable[Question],
        references: Mapping[str, Reference],
        columns: Sequence[str],
        images: Inline | None = None,
    ) -> Contents[Reference]:
        """The questions that were made of the rows.

        Args:
            columns: those that questions and scores depend on.
            images: by default those of the column "image".
        """
        return Contents(self.id, tuple(questions), references, images or self.images(), self.fingerprint(columns))

    def _bytes(self, name: str) -> bytes:
        row, column, *number = name.split("/")
        cell = self.rows[int(row)][column]
        if number:
            cell = cell[int(number[0])]
        if not isinstance(cell, dict) or not cell.get("bytes"):
            raise UserError(f"Image {name} in {self.where} has no bytes; fetch the data set again.")
        content: bytes = cell["bytes"]
        return content


def cell_names(cells: Any, column: str) -> set[str]:
    """Names of the images in an Arrow column, without touching their bytes: a split may hold many gigabytes."""
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_list(cells.type) or pyarrow.types.is_large_list(cells.type):
        counts = pyarrow.compute.list_value_length(cells).to_pylist()
        return {f"{row}/{column}/{number}" for row, count in enumerate(counts) for number in range(count or 0)}
    return {f"{row}/{column}" for row, there in enumerate(cells.is_valid().to_pylist()) if there}


def local_copy(data: Path, ids: Iterable[str]) -> tuple[str, Path] | None:
    """The first of `ids` that lies below DATA/hub."""
    return next(((name, data / "hub" / name) for name in ids if (data / "hub" / name).is_dir()), None)


def cached_copies(ids: Iterable[str]) -> list[tuple[str, Path]]:
    """Those of `ids` that have a snapshot of their branch main in the hub's cache. Nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = []
    for name in ids:
        with suppress(LocalEntryNotFoundError):
            found.append((name, Path(snapshot_download(name, repo_type="dataset", local_files_only=True))))
    return found


def open_table(data: Path, ids: Sequence[str], config: str | None, split: str, source: str = "auto") -> HubTable:
    """A split of a data set, from DATA/hub, from the hub's cache, or from the hub itself.

    Args:
        ids: repositories, the newest owner first.
        source: of eval.benchmarks.base.SOURCES; the hub is asked only when one was named. For sets that exist on the
            hub only, "official" and "mirror" are the same.
    """
    from huggingface_hub import constants

    copy = local_copy(data, ids)
    places: list[tuple[str, Path | None]] = [copy] if copy is not None else [*cached_copies(ids)]
    if not places and source == "auto":
        raise UserError(
            f"No copy of {' or '.join(ids)} below {data / 'hub'} or in the hub's cache {constants.HF_HUB_CACHE} (which "
            "HF_HOME chooses); download it there "
            f"(hf download {ids[0]} --repo-type dataset --local-dir {data / 'hub' / ids[0]}), "
            "or let --source mirror read it from the hub."
        )
    if copy is None and source != "auto":
        places += [(name, None) for name in ids]
    failures: list[UserError] = []
    for name, folder in places:
        try:
            table = _open(name, folder, config, split)
        except UserError as error:
            failures.append(error)
            continue
        if not len(table):
            raise UserError(f"Split {split} of {table.where} has no rows; fetch the data set again.")
        return table
    sentences = [str(error) for error in failures]
    if any(isinstance(error.__cause__, (ConnectionError, FileNotFoundError)) for error in failures) and copy is None:
        import datasets

        advice = how_to_get(ids[0], constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE, data=True)
        sentences.append(f"{advice[0].upper()}{advice[1:]}.")
    raise UserError(" ".join(sentences))


def _open(name: str, folder: Path | None, config: str | None, split: str) -> HubTable:
    import datasets

    fetch_again = ""
    if folder is not None:
        place = "" if folder.parent.name == "snapshots" else f" --local-dir {folder}"  # the cache, or DATA/hub
        fetch_again = f"hf download {name} --repo-type dataset{place} fetches all of it."
        datasets.disable_progress_bars()  # of the library's own copy of a table, which says nothing to a user here
        if lost := missing_files(folder):
            raise UserError(
                f"The copy of {name} in {folder} is incomplete, it lacks {len(lost):,} of its files: "
                f"{first_names(lost)}. {fetch_again}"
            )
    where = str(folder) if folder is not None else f"hub data set {name}"
    cache = None if folder is None else str(_cache(folder))
    try:
        rows = datasets.load_dataset(where if folder is not None else name, config, split=split, cache_dir=cache)
    # The library's errors for a wrong split, configuration, schema and network have no common base.
    except Exception as error:
        rows = None if folder is None else _split_alone(folder, config, split, cache)
        if rows is None:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            what = f"configuration {config}, split {split}" if config else f"split {split}"
            raise UserError(f"Cannot read {what} of {where} ({line}). {fetch_again}".rstrip()) from error
    return HubTable(name, where, undecoded(rows))


def missing_files(folder: Path) -> list[str]:
    """Files that a local copy should have: what links in it lead to, and the other parts of tables.

    Of a download that was interrupted, `datasets` reads the parts that are there, as a smaller table.
    """
    lost: list[str] = []
    parts: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(one.startswith(".") for one in name.parts):  # the hub's notes on its downloads
            continue
        if path.is_symlink() and not path.exists():
            lost.append(str(name))
        if (part := PART.match(name.name)) is not None:
            parts[str(name.with_name(part["table"])), name.suffix, int(part["count"])].add(int(part["number"]))
    for (table, suffix, count), there in parts.items():
        lost += [f"{table}-{number:05d}-of-{count:05d}{suffix}" for number in range(count) if number not in there]
    return sorted(lost)


def _split_alone(folder: Path, config: str | None, split: str, cache: str | None) -> Any:
    """A split whose files a local copy has although it lacks others that its README.md lists, or None.

    `datasets` reads all splits of a configuration, and looks at the files of the first configuration, before it gives
    one; copies of the hub's cache often hold just what was used.
    """
    import datasets
    from huggingface_hub import DatasetCard

    try:
        card = DatasetCard.load(folder / "README.md").data.to_dict()
        named = {one["config_name"]: one for one in card["configs"]}
        chosen = config or next((name for name, one in named.items() if one.get("default")), "default")
        (files,) = [one["path"] for one in named[chosen]["data_files"] if one["split"] == split]
        rows = datasets.load_dataset(str(folder), chosen, data_files={split: files}, split=split, cache_dir=cache)
        infos = card.get("dataset_info") or []
        infos = [infos] if isinstance(infos, dict) else infos
        sizes = {
            (info.get("config_name", "default"), one["name"]): one["num_examples"]
            for info in infos
            for one in info.get("splits") or ()
        }
    # A README.md of any other form, and whatever the library raises.
    except Exception:
        return None
    return rows if sizes.get((chosen, split), len(rows)) == len(rows) else None


def _cache(folder: Path) -> Path:
    """Where `datasets` keeps what it read from a local copy, another place once a file of the copy has changed.

    On its own, datasets 5.2 does not notice changes in a folder whose README.md lists its files.
    """
    import datasets

    state = [(str(path), *file_state(path)) for path in sorted(folder.rglob("*.*")) if path.is_file()]
    return Path(datasets.config.HF_DATASETS_CACHE) / "local" / hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def undecoded(rows: Any) -> Any:
    """The same rows with images as bytes: decoding is done once, by the one function that opens images here."""
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def official_file(
    data: Path, source: str, title: str, files: Sequence[Path], mirror: Sequence[str], origin: str = ""
) -> Path | None:
    """The question file to read; None for the mirror.

    Args:
        source: one of eval.benchmarks.base.SOURCES.
        title: of the questions, for the error: "ScienceQA test".
        files: names the official file goes by, the usual one first.
        mirror: repositories on the hub, the newest id first.
        origin: where to get the official file, for the error.
    """
    if source == "mirror":
        return None
    if (there := next((file for file in files if is_file(file)), None)) is not None:
        return there
    if source == "auto" and local_copy(data, mirror) is not None:
        return None
    folder = files[0].relative_to(data).parts[0]
    hub = "the hub's cache" if source == "auto" and cached_copies(mirror) else "the hub"
    raise UserError(
        f"No {title} questions at {' or '.join(map(str, files))}"
        + (f" (it is in {origin})" if origin else "")
        + (f" and no copy of {' or '.join(mirror)} below {data / 'hub'}" if source == "auto" else "")
        + f"; --data should be the folder that holds {folder}/"
        + ("." if source == "official" else f", or read them from {hub} with --source mirror.")
    )


def with_version(score: Score, there: int, expected: int) -> Score:
    """The score, with a note if the split has another number of questions than published results."""
    if there == expected:
        return score
    note = f"the data set has {there:,} questions, published numbers are about {expected:,}"
    return replace(score, notes=(*score.notes, note))


def unique_ids(names: Iterable[Any]) -> list[str]:
    """Ids as strings; those that stand for several rows get "#1", "#2", ... in file order."""
    names = [str(name) for name in names]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(f"{name}#{seen[name]}" if name in repeated else name)
    return unique


def by_unique_id(rows: Iterable[Record], column: str = "question_id") -> dict[str, Record]:
    """The rows by id, by `unique_ids` where that stands for several."""
    rows = list(rows)
    return dict(zip(unique_ids(row[column] for row in rows), rows, strict=True))


def image_names(table: HubTable, keys: Iterable[Hashable] | None = None, column: str = "image") -> list[str]:
    """Per row the image's name in HubTable.images; rows with the same key share the first one's.

    Rows about one image then share one pass of the vision tower, and intervals can draw images.

    Args:
        keys: per row what says which image it is about; None takes a hash of the encoded image.
        column: the one that holds the images.
    """
    if keys is None:
        cells = enumerate(table.rows[column])
        keys = [hashlib.sha256(cell["bytes"]).digest() if cell and cell.get("bytes") else row for row, cell in cells]
    first: dict[Hashable, int] = {}
    return [f"{first.setdefault(key, row)}/{column}" for row, key in enumerate(keys)]


def letters(options: Sequence[str | int | float]) -> dict[str, str]:
    """Options under their letters A, B, C, ..."""
    return {chr(ord("A") + place): str(option) for place, option in enumerate(options)}


def option_lines(options: Mapping[str, str], form: str = "{}. {}") -> str:
    """One line per option."""
    return "\n".join(form.format(letter, option) for letter, option in options.items())


def check_answers(where: str, answers: Mapping[str, Any]) -> None:
    """References have to be there before a model runs for hours."""
    if lost := [name for name, answer in answers.items() if answer in (None, "", [])]:
        raise UserError(f"{len(lost):,} rows of {where} have no answer: {first_names(lost)}.")


def ungraded(
    main: str, file: str, server: str, more: str = "", whole: int = 0
) -> Callable[[Sequence[str], Mapping[str, str]], Score]:
    """`score` of a split whose answers only a server knows.

    Args:
        main: name of the number that it gives.
        more: what has to be done before the upload.
        whole: questions of the split, all of which the server wants; 0 where the upload has an entry for each.
    """

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        note = f"answers are not public: upload {file} to {server}{more}"
        if len(asked) < whole:
            note += f"; it refuses this one, which answers {len(asked):,} of {whole:,} questions"
        return Score({main: None}, {}, {}, (note,), main=main)

    return score


# -- sets that exist on the hub only ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubQuestion:
    """What a row says.

    Attributes:
        suffix: the instruction how to answer.
        answer: the accepted answer or answers.
        kinds: name of a breakdown -> the group or groups that the question belongs to.
        reference: what the metric compares a text with, where that is more than the answer.
    """

    question: str
    suffix: str
    answer: str | Sequence[str]
    kinds: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    reference: Any = None


# Name of a breakdown -> question id -> the group or groups that the question belongs to.
Kinds = Mapping[str, Mapping[str, str | Sequence[str]]]


class Upload(Part):
    """A file of answers for a server.

    Attributes:
        splits: those whose answers only the server knows. The file is written for the others too.
    """

    file: str
    server: str
    splits: tuple[str, ...]


@dataclass(frozen=True)
class HubSet:
    """A set as one profile asks and scores it.

    Attributes:
        title: for sentences.
        ids: repositories, the newest owner first.
        schema: of a row.
        columns: those that questions and scores depend on.
        ask: (row, its place for errors) -> the question.
        sample_score: (text, reference) -> score in [0, 1].
        expected: our split -> questions that published numbers are about; None where nothing is published.
        main: name of the mean sample score.
        finish: (the mean and its groups, groups of all questions) -> the metric, where it is more than that.
        config: configuration on the hub.
        hub_splits: our names of splits, which are lmms-eval's in its task names -> the hub's, where they differ.
        id: column with the question's id. Rows without one have their number for it, as in lmms-eval's samples.
        image: column with the image.
        image_key: columns that together name the image, which several questions share; by default its content does.
        submission: (rows by question id, texts) -> files for who scores them; None where nobody else does.
        upload: the file that a server reads; None where no server does.
        tokens: the longest answer.
    """

    title: str
    ids: tuple[str, ...]
    schema: Any
    columns: tuple[str, ...]
    ask: Callable[[Any, str], HubQuestion]
    sample_score: Callable[[str, Any], float | bool]
    expected: Mapping[str, int | None]
    main: str = "accuracy"
    finish: Callable[[Score, Kinds], Score] = lambda score, kinds: score
    config: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    id: str = ""
    image: str = "image"
    image_key: tuple[str, ...] = ()
    submission: Callable[[Mapping[str, Any], Mapping[str, str]], dict[str, Any]] | None = None
    upload: Upload | None = None
    tokens: int = 128


def read_set(profiles: Mapping[str, HubSet], data: Path, split: str, profile: str, source: str = "auto") -> Dataset:
    """Read one split of a set in one of its profiles."""
    one = profiles[profile]
    table = open_table(data, one.ids, one.config, one.hub_splits.get(split, split), source)
    table.check_columns([one.image])
    rows = table.records(one.schema)
    names = unique_ids(row[one.id] if one.id else number for number, row in enumerate(rows))
    records = dict(zip(names, rows, strict=True))
    asked = {name: one.ask(row, f"{table.where} row {number}") for number, (name, row) in enumerate(records.items())}
    references = {name: ask.answer if ask.reference is None else ask.reference for name, ask in asked.items()}
    kinds: dict[str, dict[str, str | Sequence[str]]] = defaultdict(dict)
    for name, ask in asked.items():
        for breakdown, group in ask.kinds.items():
            kinds[breakdown][name] = group
    graded = one.upload is None or split not in one.upload.splits
    if graded:
        check_answers(table.where, {name: ask.answer for name, ask in asked.items()})

    keys: list[Hashable] | None = None
    if one.image_key:  # a row that lacks one of these columns has an image of its own
        parts = [tuple(row.get(column) for column in one.image_key) for row in rows]
        keys = [row if any(part in (None, "") for part in key) else key for row, key in enumerate(parts)]
    questions = []
    for (name, ask), image in zip(asked.items(), image_names(table, keys, one.image), strict=True):
        answer = ask.answer if isinstance(ask.answer, str) else next(iter(ask.answer), "")
        official = str(records[name].get(one.id, ""))
        questions.append(Question(name, ask.question, ask.suffix, (image,), answer, official))

    expected = one.expected[split]

    def score(names: Sequence[str], texts: Mapping[str, str]) -> Score:
        wanted = {name: references[name] for name in names}
        scored = one.finish(mean_score(wanted, texts, one.sample_score, kinds, one.main), kinds)
        return scored if expected is None else with_version(scored, len(questions), expected)

    def sample_score(question: Question, text: str) -> float:
        return float(one.sample_score(text, references[question.id]))

    facts = {"questions": len(table)} | ({} if expected is None else {"expected_questions": expected})
    return table.contents(questions, references, one.columns, table.images((one.image,))).dataset(
        f"{one.title} {split}",
        profile,
        score if one.upload is None or graded else ungraded(one.main, one.upload.file, one.upload.server),
        sample_score if graded else None,
        partial(one.submission, records) if one.submission is not None else no_submission,
        facts,
        max_new_tokens=one.tokens,
    )
