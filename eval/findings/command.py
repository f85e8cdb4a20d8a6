"""Repeat a paper's analysis on the toy model: tables, CSV files and figures.

vtr findings attnmix            # or visiondrop, consensusdrop; into results/findings
vtr findings attnmix --page     # also its part of docs/findings.md, from measurements of usual size
"""

import sys
from pathlib import Path

from eval.command import exit_on_user_error, make_parser, value
from eval.config import DEFAULT_MODEL, ROOT, count
from llava.errors import UserError

COUNTS = (
    ("pictures", 100, "pictures of the test split that scores are measured on"),
    ("exchanged", 60, "of these, pictures that are also measured with their halves exchanged"),
    ("backwards", 20, "of these, pictures whose visual tokens are also read backwards"),
)
PAPERS = ("attnmix", "visiondrop", "consensusdrop")


@exit_on_user_error
def main() -> int:
    parser = make_parser("eval.findings.command", __doc__)
    parser.add_argument("paper", choices=PAPERS)
    for name, usual, meaning in COUNTS:
        parser.add_argument(f"--{name}", type=value(count, minimum=2, maximum=300), default=usual, help=meaning)
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "results" / "findings",
        help="where measurements, tables and figures are kept; an interrupted command goes on from there",
    )
    parser.add_argument(
        "--page", action="store_true", help="write docs/findings.md, its figures and CSV files instead of FOLDER's"
    )
    args = parser.parse_args()
    for name in ("exchanged", "backwards"):
        if getattr(args, name) > args.pictures:
            raise UserError(
                f"--{name} ({getattr(args, name)}) counts some of the --pictures ({args.pictures}); lower it."
            )
    from eval.feature_cache import CachingLlava
    from eval.findings import attention, fusion
    from eval.findings.scores import CONDITIONS, collect, questions
    from eval.findings.summary import DOCS
    from llava.model.builder import load

    out = DOCS if args.page else args.folder
    names = tuple(dict.fromkeys(one.picture for one in questions()))[: args.pictures]
    model = load(DEFAULT_MODEL, device="cpu")
    drawn = collect(model, CONDITIONS[0], names, args.folder)
    if args.paper == "consensusdrop":
        attention.report_saliency(drawn, out)
        caching = CachingLlava(model)
        fusion.report_gains(caching, args.folder, out, drawn.of("encoder", "auroc"))
        fusion.report_probes(caching, args.folder, out)
    else:
        exchanged = collect(model, CONDITIONS[1], names[: args.exchanged], args.folder)
        backwards = collect(model, CONDITIONS[2], names[: args.backwards], args.folder)
        report = attention.report_alignment if args.paper == "attnmix" else attention.report_misalignment
        report(drawn, exchanged, backwards, out)
    if args.page:
        print(f"The {args.paper} part of docs/findings.md, its figure and its tables are written.")
    else:
        print(f"Tables and figures: {out / 'tables'}, {out / 'images'} (docs/findings.md: --page).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
