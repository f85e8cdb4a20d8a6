"""Repeat a paper's analysis on the toy model: CSV files and figures.

vtr findings attnmix            # or visiondrop, consensusdrop; into results/findings
vtr findings attnmix --page     # the figures and CSV files of docs/attnmix.md instead
"""

import sys
from pathlib import Path

from eval.command import exit_on_user_error, make_parser, value
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, count
from llava.places import WORK, check_bundled, check_checkout

EXCHANGED, BACKWARDS = 60, 20  # of the images: measured with halves exchanged, and read backwards, too


@exit_on_user_error
def main() -> int:
    parser = make_parser("lab.findings.command", __doc__)
    parser.add_argument("paper", choices=("attnmix", "visiondrop", "consensusdrop"))
    parser.add_argument(
        "--images",
        type=value(count, minimum=2, maximum=300),
        default=100,
        help=f"images of the test split that scores are measured on; of these, {EXCHANGED} are measured with their "
        f"halves exchanged and {BACKWARDS} with their visual tokens read backwards, too",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=WORK / "results" / "findings",
        help="where measurements, tables and figures are kept; an interrupted command goes on from there",
    )
    parser.add_argument(
        "--page", action="store_true", help="write the figures and CSV files of the page in docs/ instead of FOLDER's"
    )
    args = parser.parse_args()
    if args.page:
        check_checkout(f"{parser.prog} --page")
    check_bundled(DEFAULT_DATA)
    from eval.feature_cache import CachingLlava
    from lab.findings import attention, fusion
    from lab.findings.scores import CONDITIONS, collect, questions
    from lab.findings.summary import DOCS, write_rows
    from llava.model.builder import load

    out = DOCS if args.page else args.folder
    names = tuple(dict.fromkeys(one.image for one in questions()))[: args.images]
    model = load(DEFAULT_MODEL, device="cpu")
    counts = (args.images, EXCHANGED, BACKWARDS)
    drawn, exchanged, backwards = (
        collect(model, condition, names[:number], args.folder)
        for condition, number in zip(CONDITIONS, counts, strict=True)
    )
    table = attention.measured(drawn, exchanged, backwards)
    write_rows(out, "scores", table)
    if args.paper == "attnmix":
        attention.report_alignment(table, drawn, exchanged, out)
    elif args.paper == "visiondrop":
        attention.report_misalignment(table, drawn, out)
    else:
        caching = CachingLlava(model)
        fusion.report_gains(caching, args.folder, out, drawn.of("encoder", "auroc"))
        fusion.report_probes(caching, args.folder, out)
    print(f"CSV files and figures: {out / 'tables'}, {out / 'images'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
