"""Answer ScienceQA's questions, as LLaVA's module of this name does: with an image, or as text alone."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: import `llava` and `eval` from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.benchmarks.base import Question
from eval.benchmarks.llava_files import LETTER
from eval.benchmarks.media import Folder, image_name
from eval.benchmarks.records import check_list
from eval.benchmarks.scienceqa import IMAGE, SciencePrompt
from eval.command import exit_on_user_error
from eval.llava_scripts import ScriptQuestion, answer, file_of, questions_parser


def questions(args: Any) -> tuple[list[ScriptQuestion], Folder]:
    """The entries of LLaVA's file; those without an image are text alone."""
    path, asked = file_of(args.question_file), []
    for number, row in enumerate(check_list(path, SciencePrompt), start=1):
        text = row["conversations"][0]["value"].replace(IMAGE, "").strip()
        shown = (image_name(row["image"], f"{path} entry {number}"),) if "image" in row else ()
        question = Question(str(row["id"]), text, LETTER if args.single_pred_prompt else "", shown, "")
        prompt = f"{IMAGE}\n" * len(shown) + question.message
        asked.append(ScriptQuestion(question, {"question_id": row["id"], "prompt": prompt}))
    return asked, Folder(file_of(args.image_folder))


def eval_model(args: Any) -> None:
    answer(args, questions, max_new_tokens=1024)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = questions_parser("model_vqa_science", __doc__, conv_mode="llava_v0")
    p.set_defaults(question_file="tables/question.json")
    p.add_argument("--answer-prompter", action="store_true", help="has no effect, as in LLaVA's module")
    p.add_argument("--single-pred-prompt", action="store_true", help="ask for the letter of the answer alone")
    eval_model(p.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
