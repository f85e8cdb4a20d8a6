"""Print ScienceQA's accuracies of an answer file and write its two JSON files, as LLaVA's module of this name does."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: import `llava` and `eval` from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.answers.jsonl import AnswerRow, write_file
from eval.answers.reading import read_rows
from eval.benchmarks.scienceqa import FAILED, IMAGE, OPTIONS, ScienceRecord, parse, problems_of
from eval.command import exit_on_user_error, make_parser
from eval.metrics.accuracy import percent


def analysis_of(name: str, problem: ScienceRecord, row: AnswerRow | None) -> dict[str, Any]:
    """The official output for one answer; a question without an answer has failed."""
    prompt, text = (row.prompt or "", row.text) if row else ("Unknown", FAILED)
    return {
        "question_id": name,
        "parsed_ans": parse(text),
        "ground_truth": OPTIONS[problem["answer"] : problem["answer"] + 1],
        "question": prompt,
        "pred": text,
        "is_multimodal": IMAGE in prompt,
    }


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    p = make_parser("llava.eval.eval_science_qa", __doc__)
    p.add_argument("--base-dir", type=Path, required=True, help="folder of problems.json and pid_splits.json")
    p.add_argument("--result-file", type=Path, required=True, help="the answers")
    p.add_argument("--output-file", type=Path, required=True, help="every answer beside its reference")
    p.add_argument("--output-result", type=Path, required=True, help="the numbers, and the choices by question")
    p.add_argument("--split", default="test", help="of pid_splits.json")
    p.add_argument("--options", type=list, default=list(OPTIONS), choices=[list(OPTIONS)], help="letters")
    args = p.parse_args(arguments)
    problems = problems_of(args.base_dir / "problems.json", args.split)
    rows = {row.id: row for row in read_rows(args.result_file)[0]}
    sides: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
    chosen: dict[str, int] = {}
    texts: dict[str, str] = {}
    for name, problem in problems.items():
        one = analysis_of(name, problem, rows.get(name))
        texts[name], chosen[name] = one["pred"], OPTIONS[: len(problem["choices"])].find(one["parsed_ans"])
        sides["correct" if chosen[name] == problem["answer"] else "incorrect"].append(one)
    marks = [(float(side == "correct"), one["is_multimodal"]) for side in sides for one in sides[side]]
    accuracy, shown = percent(mark for mark, _ in marks), [mark for mark, image in marks if image]
    image = f"{percent(shown):.2f}%" if shown else "n/a, no answer to a question with an image"
    right = len(sides["correct"])
    print(f"Total: {len(marks)}, Correct: {right}, Accuracy: {accuracy:.2f}%, IMG-Accuracy: {image}")
    numbers = {"acc": accuracy, "correct": right, "count": len(marks), "results": chosen, "outputs": texts}
    write_file(args.output_file, json.dumps(sides, indent=2))
    write_file(args.output_result, json.dumps(numbers, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
