"""Write a page with all results below a folder: plots, filters and a sortable table.

vtr report
vtr report results/gqa-testdev --output gqa.html
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.answers.jsonl import write_file
from eval.command import Parser, exit_on_user_error, make_parser, value
from eval.config import path_name
from llava.errors import UserError


def parser() -> Parser:
    p = make_parser("eval.pages.report", __doc__)
    p.add_argument(
        "folder", nargs="?", type=value(path_name), default="results", help="folder that holds runs, at any depth"
    )
    p.add_argument("--output", type=value(path_name), default="report.html", help="the page to write, one HTML file")
    return p


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parser().parse_args(arguments)
    folder, output = Path(args.folder), Path(args.output)
    if output.is_dir():
        raise UserError(
            f"--output {output} is a folder; name the HTML file to write, such as {output / 'report.html'}."
        )
    from eval.pages.report.page import page, summary
    from eval.pages.report.results import collect

    found = collect(folder)
    command = shlex.join(["vtr", "report", str(folder), "--output", str(output)])
    write_file(output, page(found, folder, output, command))
    for sentence in found.damaged:
        print(f"left out: {sentence}", file=sys.stderr)
    print(summary(found))
    print(f"Wrote {output}; open it in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
