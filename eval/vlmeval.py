"""VLMEvalKit's own models under a method; the words after -- are a command line of its run.py.

    vtr run-vlmeval consensusdrop 64 -- /path/to/VLMEvalKit/run.py --data MME --model llava-onevision-qwen2-7b-ov-hf

Read: open-compass/VLMEvalKit, snapshot of August 2026, run.py, vlmeval/inference.py and vlmeval/vlm/base.py
"""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.command import exit_on_user_error, make_parser
from eval.config import folder_name, options_by_method
from eval.harnesses import Choice, UnderMethod, ends_the_process, refuse_ranks
from llava.errors import UserError

ROOT_VARIABLE, FOLDER_FLAG = "MMEVAL_ROOT", "--work-dir"


class Inside:
    """Replaces `generate` of VLMEvalKit's BaseModel: the model's own `generate` runs under the method."""

    def __init__(self, choice: Choice, original: Callable[..., Any]) -> None:
        self.choice, self.original = choice, original
        self.model: Any = None
        self.under: UnderMethod | None = None

    @ends_the_process
    def __call__(self, model: Any, message: Any, dataset: str | None = None) -> Any:
        if self.under is None:
            self.model = model
            tokenizer = getattr(model, "tokenizer", None) or getattr(model, "processor", None)
            self.under = UnderMethod(getattr(model, "model", None), self.choice, tokenizer)
        if model is not self.model:
            raise UserError("vtr run-vlmeval runs one model at a time; start it once for each --model.")
        parts = model.preproc_content(message)
        text = "\n".join(part["value"] for part in parts if part["type"] == "text")
        with self.under.asking([text]):
            return self.original(model, parts, dataset)

    def close(self) -> None:
        if self.under is None:
            raise UserError(
                f"VLMEvalKit asked no model of its own in this run, so nothing ran under {self.choice.method}: the "
                "answers were there already (--reuse), the model is behind an API, or run.py stopped before."
            )
        self.under.close()


def own_folder(arguments: list[str], choice: Choice) -> list[str]:
    """The arguments with an output folder for the method, as VLMEvalKit names its files by model and data set only."""
    options = [f"{key}={value}" for key, value in sorted(choice.options.items())]
    name = folder_name("-".join(filter(None, [choice.method, choice.budget, *options])))
    if root := os.environ.get(ROOT_VARIABLE):  # the variable overrides the flag
        os.environ[ROOT_VARIABLE] = str(Path(root) / name)
    elif not any(word.partition("=")[0] == FOLDER_FLAG for word in arguments):
        return [*arguments, FOLDER_FLAG, str(Path("outputs") / name)]
    return arguments


@exit_on_user_error
def main() -> int:
    """The command line; returns the exit code."""
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    parser = make_parser("eval.vlmeval", __doc__)
    parser.add_argument("method", help="see vtr show methods")
    parser.add_argument("budget", nargs="?", help="visual tokens of an image, or their ratio to keep, as 1/9")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    parser.add_argument("--text-tower", help="folder or hub id of the CLIP whose text half some methods need")
    given = parser.parse_args(words[:split])
    script, *arguments = words[split + 1 :] or [""]
    if not Path(script).is_file():
        raise UserError(f"The words after -- begin with the path of VLMEvalKit's run.py; there is no file {script!r}.")
    refuse_ranks("vtr run-vlmeval", "start it without torchrun")
    options = options_by_method([given.method], given.set)[given.method]
    choice = Choice(given.method, given.budget, options, given.text_tower)
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError as error:
        raise UserError(f"VLMEvalKit cannot be imported ({error}); install its requirements.txt.") from error
    inside = Inside(choice, BaseModel.generate)
    BaseModel.generate = lambda model, message, dataset=None: inside(model, message, dataset)
    sys.argv = [script, *own_folder(arguments, choice)]
    runpy.run_path(script, run_name="__main__")
    inside.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
