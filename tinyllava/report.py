"""Measure the embedded model on the embedded test set and fill in its model card.

    python -m tinyllava.report --folder runs/tiny

Accuracy by question family with all visual tokens, beside what a lookup without the picture answers.
"""

import argparse
import json
from pathlib import Path

from eval.answers.jsonl import read_json
from eval.config import DEFAULT_DATA, DEFAULT_MODEL, ROOT
from eval.sweep import Remembering, Setting, sweep
from eval.tables.page import insert, markdown
from llava.model.builder import load
from tinyllava.corpus import Corpus
from tinyllava.text_only import TextOnly, training_questions

CARD = Path(DEFAULT_MODEL) / "README.md"
HARD = 20.0  # points above the text-only baseline below which a family is marked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the training folder")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "sweep", help="where answers are kept")
    args = parser.parse_args()
    model = Remembering(load(DEFAULT_MODEL))
    credits = sweep([Setting("full", None)], model, DEFAULT_DATA, "testdev", args.output)[0]
    records = read_json(DEFAULT_DATA / "gqa" / "data" / "testdev_balanced_questions.json")
    lookup = TextOnly(training_questions(Corpus(args.folder / "train"), 6000))
    blind = {name: float(lookup.answer(family_of(r), r["question"]) == r["answer"]) for name, r in records.items()}
    insert(CARD, "families", family_table(records, credits, blind))
    insert(CARD, "training", training_table(args.folder))


def family_of(record: dict) -> str:
    return record["types"]["detailed"]


def family_table(records: dict, credits: dict[str, float], blind: dict[str, float]) -> str:
    """Accuracy by family and kind of scene; a family near its text-only baseline is marked hard."""

    def percent(values: dict[str, float], names: list[str]) -> float:
        return 100 * sum(values[name] for name in names) / len(names)

    rows = []
    for family in dict.fromkeys(map(family_of, records.values())):
        names = [name for name, record in records.items() if family_of(record) == family]
        kinds = [[n for n in names if records[n]["groups"]["global"] == kind] for kind in ("natural", "dense")]
        seen, text = percent(credits, names), percent(blind, names)
        label = f"{family} (hard)" if seen - text < HARD else family
        rows.append(
            [label, f"{len(names):,}", f"{seen:.1f}", *(f"{percent(credits, k):.1f}" for k in kinds), f"{text:.1f}"]
        )
    everything = list(records)
    kinds = [[n for n in everything if records[n]["groups"]["global"] == kind] for kind in ("natural", "dense")]
    overall = [percent(credits, everything), *(percent(credits, k) for k in kinds), percent(blind, everything)]
    rows.append(["**all**", f"{len(everything):,}", *(f"{value:.1f}" for value in overall)])
    return markdown(["family", "questions", "576 tokens", "natural scenes", "dense scenes", "text only"], rows)


def training_table(folder: Path) -> str:
    """Steps and wall time of both stages, as their logs have them."""
    rows = []
    for stage in ("vision", "language"):
        last = json.loads((folder / f"{stage}.log.jsonl").read_text().splitlines()[-1])
        rows.append([stage, f"{last['step']:,}", f"{last['seconds'] / 60:.0f}", f"{last['loss']:.3f}"])
    return markdown(["stage", "steps", "minutes", "running loss at the end"], rows)


if __name__ == "__main__":
    main()
