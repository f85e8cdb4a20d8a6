"""MMStar, 1,500 multiple-choice questions that cannot be answered without their picture.

Read from DATA/hub/Lin-Chen/MMStar: index, question (with its options), answer, category, l2_category, image.

Profile llava: the authors' rule. Their prompt is the question as the data set has it; LLaVA's instruction for multiple
choice follows, because the authors' own wrapper for LLaVA ends on it wherever it knows the options, and because without
it LLaVA answers in sentences, which a rule that reads first characters takes for wrong.
Profile lmms: lmms-eval 0.7.3, whose instruction is the same without the full stop, with its own rule and average.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.dataset import Benchmark, Dataset, Question
from eval.hub_set import check_answers, facts, open_split, picture_hashes, picture_names, unique_ids, with_version
from eval.metrics import Score
from eval.metrics import mmstar as metric
from eval.prompts import LETTER
from eval.spreadsheet import read_xlsx, write_xlsx

IDS = ("Lin-Chen/MMStar",)
COLUMNS = ("index", "question", "answer", "category", "l2_category")
EXPECTED = 1500

LMMS_LETTER = LETTER.removesuffix(".")
# lmms-eval takes this out of questions, a remainder of MME's task.
LMMS_REMOVED = " Please answer yes or no."


def load(data: Path, split: str, profile: str = "llava", source: str = "auto") -> Dataset:
    """Read the split."""
    table = open_split(data, IDS, None, split, source)
    rows = table.records(COLUMNS, ("meta_info",))
    records = dict(zip(unique_ids(row["index"] for row in rows), rows, strict=True))
    check_answers(table.where, {name: record["answer"] for name, record in records.items()})
    pictures = picture_names(picture_hashes(table))
    lmms = profile == "lmms"
    questions = tuple(
        Question(
            name,
            record["question"].strip().replace(LMMS_REMOVED, "") if lmms else record["question"],
            LMMS_LETTER if lmms else LETTER,
            (picture,),
            record["answer"],
            str(record["index"]),
        )
        for (name, record), picture in zip(records.items(), pictures, strict=True)
    )
    items = {name: metric.Item(r["answer"], r["category"], r["l2_category"]) for name, r in records.items()}

    def score(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        rule = metric.lmms_score if lmms else metric.official_score
        return with_version(rule({name: items[name] for name in asked}, texts), len(questions), EXPECTED)

    def judge(question: Question, text: str) -> float:
        return (metric.lmms_credit if lmms else metric.official_credit)(text, question.answer)

    def submission(texts: Mapping[str, str]) -> dict[str, Any]:
        return {"MMStar.xlsx": workbook({name: records[name] for name in texts}, texts)}

    return Dataset(
        f"MMStar {split}",
        questions,
        table.pictures(),
        table.fingerprint(COLUMNS),
        score,
        judge,
        submission,
        # The default of LLaVA's scripts, and lmms-eval's where a task sets none.
        max_new_tokens=128,
        facts=facts(table, profile, EXPECTED),
        read=read_xlsx,
    )


def workbook(records: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str]) -> bytes:
    """The input of the authors' script: one row per answer, with the set a question was taken from as "bench"."""
    rows = (
        [*(r[column] for column in COLUMNS), (r.get("meta_info") or {}).get("source", ""), texts[name]]
        for name, r in records.items()
    )
    return write_xlsx([*COLUMNS, "bench", "prediction"], rows)


BENCHMARK = Benchmark(
    name="mmstar",
    summary="Multiple choice that needs the picture, in six categories.",
    splits=("val",),
    load=load,
    published="30.3 accuracy †",
    published_by="LLaVA-1.5-7B, from memory",
    mirror=IDS,
    licence="see https://huggingface.co/datasets/Lin-Chen/MMStar and the sets it was drawn from",
)
