"""Print TextVQA's accuracy of answer files, as LLaVA's module of this name does."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started by its path: import `llava` and `eval` from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.answers.reading import read_rows
from eval.benchmarks.llava_files import people_said
from eval.benchmarks.records import check_list
from eval.benchmarks.textvqa import OCR, Official
from eval.command import exit_on_user_error, make_parser
from llava.errors import UserError
from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator


def prompt_processor(prompt: str) -> str:
    """The question of a prompt in lower case, in any of the three wordings of LLaVA's question files."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        _, _, rest = prompt.partition("Question: ")
        question, found, _ = rest.partition(" Short answer:")
        lines = [question] if found else []
    elif OCR in prompt and len(lines) == 3:
        lines = lines[1:] if prompt.startswith(OCR.strip()) else lines
    elif len(lines) != 2:
        lines = []
    if not lines:
        raise UserError(f"A prompt of TextVQA should hold its question on a line of its own, got {prompt[:80]!r}.")
    return lines[0].lower()


def eval_single(annotation_file: str, result_file: str) -> None:
    """Print the name of an answer file, the number of its answers and their accuracy."""
    print(Path(result_file).stem)
    records = check_list(Path(annotation_file), Official, "data")
    known = {(str(one["image_id"]), one["question"].lower()): people_said(one["answers"]) for one in records}
    entries = []
    for row in read_rows(Path(result_file))[0]:
        asked = (row.id or "", prompt_processor(row.prompt or ""))
        if asked not in known:
            raise UserError(f"{row.where} answers {asked[1]!r} about image {asked[0]}, which {annotation_file} lacks.")
        entries.append({"pred_answer": row.text, "gt_answers": known[asked]})
    accuracy = TextVQAAccuracyEvaluator().eval_pred_list(entries)
    print(f"Samples: {len(entries)}\nAccuracy: {100 * accuracy:.2f}%\n")


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("llava.eval.eval_textvqa", __doc__)
    p.add_argument("--annotation-file", required=True, help="TextVQA_0.5.1_val.json")
    p.add_argument("--result-file", help="a file of answers")
    p.add_argument("--result-dir", help="a folder of such files")
    args = p.parse_args(arguments)
    if args.result_file is not None:
        eval_single(args.annotation_file, args.result_file)
    for path in sorted(Path(args.result_dir).iterdir()) if args.result_dir is not None else ():
        if path.suffix == ".jsonl":
            eval_single(args.annotation_file, str(path))
        else:
            print(f"Skipping {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
