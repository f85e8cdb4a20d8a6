"""Answer MMBench's table of questions, as LLaVA's module of this name does."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: import `llava` and `eval` from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.benchmarks.base import Question
from eval.benchmarks.llava_files import LETTER, LETTER_CN
from eval.benchmarks.media import Images
from eval.benchmarks.mmbench import OPTIONS, as_pandas, ask, options_of, read_tsv
from eval.command import exit_on_user_error
from eval.llava_scripts import ScriptQuestion, answer, decoding_flags, file_of, questions_parser


def questions(args: Any) -> tuple[list[ScriptQuestion], Images]:
    """One question per row of the table; with --all-rounds one per option, and the options rotate by one each time."""
    table, asked = read_tsv(file_of(args.question_file)), []
    suffix = (LETTER_CN if args.lang == "cn" else LETTER) if args.single_pred_prompt else ""
    for index, row in as_pandas(table.references).items():
        options = options_of(row)
        letters = list(OPTIONS[: len(options)])
        for number in range(len(options) if args.all_rounds else 1):
            turned, marks = (values[number:] + values[:number] for values in (options, letters))
            text = ask(row | dict(zip(OPTIONS, turned, strict=False)))
            fields = {"question_id": int(index), "round_id": number, "prompt": text}
            fields |= {"options": turned, "option_char": marks}
            asked.append(ScriptQuestion(Question(index, text, suffix, (str(row["image_name"]),), ""), fields))
    return asked, table.images


def eval_model(args: Any) -> None:
    answer(args, questions, max_new_tokens=1024)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = decoding_flags(questions_parser("model_vqa_mmbench", __doc__))
    p.add_argument("--all-rounds", action="store_true", help="ask every question with each order of its options")
    p.add_argument("--single-pred-prompt", action="store_true", help="ask for the letter of the answer alone")
    p.add_argument("--lang", default="en", choices=("en", "cn"), help="of the instruction")
    eval_model(p.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
