"""LLaVA's scripts/convert_*.py: convert answer files to what the official scorers and servers read.

Every function that returns an exit code is the command line of one script, with LLaVA's flags. The files equal those
that `vtr eval` writes for its own answers.

Official code read: haotian-liu/LLaVA@c121f04, scripts/convert_*.py
Differs from it: the folder of the output is made; only the last line of an answer file may be damaged.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.answers.jsonl import AnswerRow, read_json, write_file
from eval.answers.reading import read_rows
from eval.benchmarks import mmbench, seed
from eval.benchmarks.hub import by_unique_id
from eval.benchmarks.llava_files import json_lines, read_prompts
from eval.benchmarks.records import check_list
from eval.command import exit_on_user_error, make_parser
from eval.metrics import first_names, vqa
from eval.metrics.accuracy import normalise
from llava.errors import UserError


def flags(script: str, about: str, *names: str, **defaults: str) -> argparse.Namespace:
    """Parse a script's command line; flags without a default are required."""
    p = make_parser(f"scripts.{script}", about)
    for name in (*names, *defaults):
        p.add_argument(f"--{name.replace('_', '-')}", required=name not in defaults, default=defaults.get(name))
    return p.parse_args()


def rows_of(path: Path | str) -> list[AnswerRow]:
    return read_rows(Path(path))[0]


@exit_on_user_error
def gqa() -> int:
    """Write answers as GQA's official script reads them."""
    args = flags("convert_gqa_for_eval", "Answers as GQA's official script reads them.", "src", "dst")
    rows = [{"questionId": row.fields["question_id"], "prediction": normalise(row.text)} for row in rows_of(args.src)]
    write_file(Path(args.dst), json.dumps(rows))
    return 0


@exit_on_user_error
def mmvet() -> int:
    """Write answers as MM-Vet's evaluator reads them."""
    args = flags("convert_mmvet_for_eval", "Answers as MM-Vet's evaluator reads them.", "src", "dst")
    write_file(Path(args.dst), json.dumps({f"v1_{row.id}": row.text for row in rows_of(args.src)}, indent=2))
    return 0


@exit_on_user_error
def mmbench_upload() -> int:
    """Write the workbook for MMBench's server."""
    names = ("annotation_file", "result_dir", "upload_dir", "experiment")
    args = flags("convert_mmbench_for_submission", "The workbook for MMBench's server.", *names)
    table = mmbench.read_tsv(Path(args.annotation_file))
    texts = {row.id or "": row.text for row in rows_of(f"{args.result_dir}/{args.experiment}.jsonl")}
    book = mmbench.workbook(replace(table, references=mmbench.as_pandas(table.references)), texts)
    write_file(Path(args.upload_dir) / f"{args.experiment}.xlsx", book)
    return 0


@exit_on_user_error
def seed_upload() -> int:
    """Print SEED-Bench's accuracies, and write the file for its leaderboard."""
    names = ("annotation_file", "result_file", "result_upload_file")
    args = flags("convert_seed_for_submission", "SEED-Bench's accuracies, and the file for its leaderboard.", *names)
    path = Path(args.annotation_file)
    document: Any = read_json(path)
    records = by_unique_id(check_list(path, seed.SeedRecord, "questions"))
    items, texts = seed.read_items(records), {row.id or "": row.text for row in rows_of(args.result_file)}
    by_item = {name: texts[item.official] for name, item in items.items() if item.official in texts}
    if lost := [name for name in items if name not in by_item]:
        raise UserError(f"{args.result_file} lacks {len(lost):,} of the answers to {path}: {first_names(lost)}.")
    score = seed.evaluate(items, by_item)
    titles = {seed.TYPES.get(number): title for title, number in document["question_type"].items()}
    for kind, (accuracy, _) in score.groups["type"].items():
        print(f"{titles.get(kind, kind)}: {accuracy:.2f}%")
    for kind, name in (("Total", "accuracy"), ("image", "image_accuracy"), ("video", "video_accuracy")):
        if (value := score.values.get(name)) is not None:
            print(f"{kind} accuracy: {value:.2f}%")
    uploaded = ({"question_id": records[name]["question_id"], "prediction": text} for name, text in by_item.items())
    write_file(Path(args.result_upload_file), json_lines(uploaded))
    return 0


def processed(result: Path, questions: Path) -> tuple[dict[str, str], list[Any]]:
    """Question id -> answer after the EvalAI answer processor, and the questions; their numbers are printed."""
    rows, damaged = read_rows(result, partial=True)
    wanted = read_prompts(questions)
    answers = {row.id or "": vqa.process(row.text) for row in rows}
    print(f"total results: {len(answers)}, total split: {len(wanted)}, error_line: {len(damaged)}")
    return answers, wanted


@exit_on_user_error
def vizwiz() -> int:
    """Write the file for VizWiz's server."""
    names = ("annotation_file", "result_file", "result_upload_file")
    args = flags("convert_vizwiz_for_submission", "The file for VizWiz's server.", *names)
    answers, wanted = processed(Path(args.result_file), Path(args.annotation_file))
    if lost := [str(one.id) for one in wanted if str(one.id) not in answers]:
        raise UserError(f"{args.result_file} lacks {len(lost):,} of the answers: {first_names(lost)}.")
    rows = [{"image": one.image, "answer": answers[str(one.id)]} for one in wanted]
    write_file(Path(args.result_upload_file), json.dumps(rows))
    return 0


@exit_on_user_error
def vqav2() -> int:
    """Write the file for VQAv2's server, with an empty answer to every test2015 question that was not asked."""
    args = flags(
        "convert_vqav2_for_submission",
        "The file for VQAv2's server.",
        "ckpt",
        "split",
        dir="./playground/data/eval/vqav2",
    )
    folder, place = Path(args.dir), Path(args.split) / args.ckpt
    source = folder / "answers" / place / "merge.jsonl"
    answers, wanted = processed(source, folder / "llava_vqav2_mscoco_test2015.jsonl")
    rows = [{"question_id": one.id, "answer": answers.get(str(one.id), "")} for one in wanted]
    write_file(folder / "answers_upload" / f"{place}.json", json.dumps(rows))
    return 0
