"""Answer a file of questions, with up to 1,024 tokens each, as LLaVA's module of this name does."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: import `llava` and `eval` from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.command import exit_on_user_error
from eval.llava_scripts import answer, decoding_flags, questions_of_lines, questions_parser


def eval_model(args: Any) -> None:
    answer(args, questions_of_lines, max_new_tokens=1024)


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    eval_model(decoding_flags(questions_parser("model_vqa", __doc__)).parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
