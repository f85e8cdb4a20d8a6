"""Answer a file of questions, with at most 128 tokens each, as LLaVA's module of this name does.

    python -m llava.eval.model_vqa_loader --model-path liuhaotian/llava-v1.5-7b --question-file questions.jsonl \\
        --image-folder images --answers-file answers.jsonl --temperature 0 --conv-mode vicuna_v1
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: import `llava` and `eval` from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.command import exit_on_user_error
from eval.llava_scripts import answer, decoding_flags, questions_of_lines, questions_parser


def eval_model(args: Any) -> None:
    answer(args, questions_of_lines, args.max_new_tokens)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = decoding_flags(questions_parser("model_vqa_loader", __doc__))
    p.add_argument("--max_new_tokens", type=int, default=128, help="longest answer")
    eval_model(p.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
