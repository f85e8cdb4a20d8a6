"""Record what every method keeps, answers and scores, to check that a change of the code did not alter it.

    python scripts/dev/record.py before.json                         # 25 methods on 12 models, and two tables
    python scripts/dev/record.py after.json --against before.json    # exit code 1 and a list where they differ
    python scripts/dev/record.py some.json --methods visiondrop,fastv --models tinyllava

A record holds, for each model, method and budget: the tokens kept at every reduction of every question, the answers,
the metrics with their intervals and the tokens per layer, or the sentence with which the method refuses. It also holds
what `reduce` keeps and generates on tiny models of six families, the tokens that images become inside a serving engine
(a stand-in plays its tower), and the cells of two papers' tables. Compare only records of the same machine, because
another processor may decide near ties differently.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import llava.pipeline.generate as pipeline  # noqa: E402

# The modules imported below take the function from there, so it is replaced first.
unwatched, pipeline.generate = pipeline.generate, lambda *arguments, **options: watched(*arguments, **options)

from eval import cli  # noqa: E402
from eval.__main__ import main as evaluate  # noqa: E402
from llava import reduce  # noqa: E402
from llava.errors import UserError  # noqa: E402
from llava.reduction import registry  # noqa: E402
from tests import engine_stand_in, stock_families  # noqa: E402
from tests.tiny_checkpoints_families import save_qwen_transformers  # noqa: E402

# model -> data folder, benchmark and the two budgets. Qwen's weights are random, from a fixed seed.
MODELS = {
    "tinyllava": ("eval", "gqa", "64,192"),
    "tinyllava_instruct": ("eval", "textvqa", "64,192"),
    "tinyllava_boxes": ("eval", "refcoco", "64,192"),
    "tinyllava_next": ("eval_next", "gqa", "160,320"),
    "tinyllava_video": ("eval_video", "video_qa", "136,256"),
    "tinyqwen": ("eval", "gqa", "1/4,1/2"),
}
TABLES = {
    "consensusdrop/llava15_7b": "fastervlm,visiondrop,consensusdrop,divprune",
    "visiondrop/llava_next_7b": "fastv,visiondrop",
}
# Names of tests.stock_families: windows, tiles, packed tiles, one direction less, padded images, row breaks.
FAMILIES = ("qwen2_5_vl", "internvl3", "onevision", "gemma3", "idefics3", "mistral3")
LIMIT = 6
SCORES = ("asked", "failed", "metrics", "confidence", "groups", "accounting", "off_budget")  # of result.json
KEPT: dict[str, list[Any]] = {}
# Names of fields that depend on the clock, the machine or the code's own hash: whole names, and parts of names.
ONCE = ("run", "finished")
VOLATILE = ("seconds", "time", "ttft", "date", "commit", "hash", "machine", "path", "folder", "command", "sentence")


def watched(*arguments: Any, **options: Any) -> Any:
    """`generate`, which also stores in KEPT what is kept and answered, by question id."""
    batch = unwatched(*arguments, **options)
    for answer in batch.answers:
        steps = [[step.reduction.kept.tolist(), step.reduction.inputs] for step in answer.trace]
        KEPT[answer.id] = [answer.text, list(answer.token_ids), steps]
    return batch


def run(command: Any, arguments: Sequence[str]) -> str | None:
    """Run a command; returns None, or the last sentence on stderr if it fails."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = command(list(arguments))
        except SystemExit as end:
            code = end.code
    lines = [line for line in errors.getvalue().strip().splitlines() if line]
    return None if not code else (lines[-1] if lines else f"exit code {code}")


def steady(value: Any) -> Any:
    """A result without the fields that differ between two runs of the same code on one machine."""
    if isinstance(value, dict):
        kept = (key for key in value if key not in ONCE and not any(word in key.lower() for word in VOLATILE))
        return {key: steady(value[key]) for key in kept}
    return [steady(item) for item in value] if isinstance(value, list) else value


def record_answers(model: str, checkpoint: Path, method: str) -> dict[str, Any]:
    """Budget -> kept tokens, answers and scores of one method on one model."""
    data, benchmark, budgets = MODELS[model]
    cells = {}
    for budget in ("all",) if method == "full" else budgets.split(","):
        output = Path(f"{model}-{method}-{budget.replace('/', 'of')}")
        asked = ["--method", method, *(() if method == "full" else ("--budget", budget)), "--benchmark", benchmark]
        asked += ["--model", str(checkpoint), "--data", str(ROOT / "assets" / data), "--limit", str(LIMIT)]
        asked += ["--output", str(output), "--batch-size", "3", "--wandb", "disabled", "--device", "cpu"]
        KEPT.clear()
        refused = run(evaluate, asked)
        results = [steady(json.loads(path.read_text())) for path in sorted(output.rglob("result.json"))]
        scores = [{key: result[key] for key in SCORES} for result in results]
        cells[budget] = {"refused": refused, "kept": dict(KEPT), "scores": scores}
    return cells


def record_table(name: str) -> list[dict[str, str]]:
    """The rows of a paper's table on the toy model, from its CSV file."""
    asked = ["tables", "paper", name, "--limit", str(LIMIT), "--methods", TABLES[name], "--benchmarks", "gqa,pope"]
    refused = run(cli.main, [*asked, "--wandb", "disabled", "--output", name.replace("/", "-")])
    files = sorted(Path(name.replace("/", "-")).rglob("*.csv"))
    if not files:
        return [{"refused": refused or "no CSV file"}]
    with files[0].open(newline="") as file:
        lines = [line for line in file if not line.startswith("#")]
    return [{key: value for key, value in row.items() if steady({key: value})} for row in csv.DictReader(lines)]


def record_family(name: str, method: str) -> dict[str, Any]:
    """What `reduce` keeps and generates on a tiny model, of prompts with one and with two images."""
    model, inputs, tokens = stock_families.tiny(name), stock_families.call(name, (1, 2)), stock_families.count(name)
    cells: dict[str, Any] = {}
    for budget in ("all",) if method == "full" else (tokens // 3, tokens * 5 // 8):
        try:
            with reduce(model, method, None if method == "full" else budget) as reduced:
                output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        except UserError as error:
            cells[str(budget)] = str(error)
            continue
        steps = [[[step.reduction.kept.tolist(), step.reduction.inputs] for step in trace] for trace in reduced.traces]
        cells[str(budget)] = {"kept": steps, "ids": output.tolist()}
    return cells


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """One line for each difference between two records. Only what both hold is compared."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before:
            if key in after:
                yield from differences(before[key], after[key], f"{where}/{key}")
            elif where.count("/") > 2:  # below a model and a method, nothing of `before` may be missing
                yield f"{where}/{key} is missing"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{where}[{place}]")
    elif before != after:
        yield f"{where}: {str(before)[:100]} -> {str(after)[:100]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="an earlier record to compare with")
    parser.add_argument("--methods", help="some methods, separated by commas; then no tables")
    parser.add_argument("--models", default=",".join(MODELS), help="some models, separated by commas")
    args = parser.parse_args()
    registry.load_all()
    methods = args.methods.split(",") if args.methods else sorted(registry.METHODS)
    target, earlier = args.file.resolve(), args.against and json.loads(args.against.read_text())
    record: dict[str, Any] = {"answers": {}, "tables": {}, "families": {}, "engine": {}}
    for method in methods:
        record["engine"][method] = engine_stand_in.kept_tokens(method)
        for name in FAMILIES:
            record["families"].setdefault(name, {})[method] = record_family(name, method)
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        save_qwen_transformers(Path(folder) / "tinyqwen")
        for model in args.models.split(","):
            checkpoint = Path(folder) / model if model == "tinyqwen" else ROOT / "assets" / model
            cells = record["answers"][model] = {}
            for method in methods:
                cells[method] = record_answers(model, checkpoint, method)
                print(f"{model} {method}", file=sys.stderr)
        if not args.methods:
            record["tables"] = {name: record_table(name) for name in TABLES}
        os.chdir(ROOT)
    target.write_text(json.dumps(record))
    found = list(differences(earlier, record)) if earlier else []
    print("\n".join(found[:200]))
    print(f"{target}: {len(found)} differences" if earlier else target)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
