"""What a running evaluation or training tells W&B."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.tracking.access import one_line
from eval.tracking.samples import Drawings
from eval.tracking.summary import HEADLINE, headline, numbers_of

if TYPE_CHECKING:
    from llava.pipeline.accounting import Batch
    from llava.processing.prompt import Sample

SETTINGS = ("device", "dtype", "batch_size")  # conditions of the timing that are settings as well


class Tracker:
    """Logging switched off; also the interface."""

    def batch(
        self,
        samples: Sequence["Sample"],
        batch: "Batch",
        credits: Sequence[float],
        answered: int,
        accuracy: float | None,
    ) -> None:
        """One batch is stored; `accuracy` (percent) is over all `answered` questions so far, or None."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of a training step."""

    def finish(self, result: Mapping[str, Any], rows: Callable[[], Sequence[Sequence[Any]]]) -> None:
        """The run is complete.

        Args:
            rows: returns the sample table in the order of COLUMNS, the image or None and None for the kept tokens.
        """

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table of its own."""

    def send(self, action: Callable[[Any, Any], Any]) -> None:
        """Call `action(wandb, run)`, if there is a run: for what the functions above do not cover."""

    def close(self, failed: bool) -> None:
        """Always called last."""


class WandbTracker(Tracker):
    """Logging to one W&B run.

    Args:
        output: the folder that the results are in.
        resumed: an earlier process logged to this run.
    """

    def __init__(self, wandb: Any, run: Any, output: Path, resumed: bool = False):
        self._wandb = wandb
        self._run = run
        self._output = output
        self._resumed = resumed
        self._answered: int | None = None  # questions, once this process has answered any
        self._drawings = Drawings(wandb)

    def batch(
        self,
        samples: Sequence["Sample"],
        batch: "Batch",
        credits: Sequence[float],
        answered: int,
        accuracy: float | None,
    ) -> None:
        self._drawings.add(samples, batch, credits)
        self._answered = answered
        numbers = {
            "progress/answered": answered,
            **({} if accuracy is None else {"progress/accuracy": accuracy}),
            "progress/batch_size": len(samples),
            "progress/batch_prefill_ms": 1000 * batch.timing.prefill,
            "progress/batch_decode_ms": 1000 * batch.timing.decode,
        }
        # The number of answers as the step: a continued run goes on where the earlier one stopped.
        self._guard(lambda: self._run.log(numbers, step=answered))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._guard(lambda: self._run.log(dict(numbers), step=step))

    def finish(self, result: Mapping[str, Any], rows: Callable[[], Sequence[Sequence[Any]]]) -> None:
        new = self._answered is not None or not self._resumed
        if not new and result["partial"]:
            return  # the run of all questions keeps its numbers when the first few are looked at again
        self._guard(lambda: self._summarise(result))
        if new:
            self._guard(lambda: self._run.log({"samples": self._drawings.table(rows())}, step=self._answered))
            self._guard(self._log_gallery)

    def _summarise(self, result: Mapping[str, Any]) -> None:
        short = dict(zip(HEADLINE, headline(result, self._output), strict=True))
        self._run.summary.update(
            numbers_of(result)
            | {name: value for name, value in short.items() if value is not None}
            | {"sentence": result["sentence"], "commit": result["commit"]}
        )
        conditions = {key: value for key, value in result["conditions"].items() if key not in SETTINGS}
        self._run.config.update({"versions": result["versions"], **conditions}, allow_val_change=True)

    def _log_gallery(self) -> None:
        if pictures := self._drawings.gallery():
            self._run.log({"kept tokens": pictures}, step=self._answered)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        content = [list(row) for row in rows]
        self._guard(lambda: self._run.log({name: self._wandb.Table(columns=list(columns), data=content)}))

    def send(self, action: Callable[[Any, Any], Any]) -> None:
        self._guard(lambda: action(self._wandb, self._run))

    def close(self, failed: bool) -> None:
        self._guard(lambda: self._finish(int(failed)))
        if self._run is None:
            return
        if self._run.offline:
            print(f"W&B: offline run in {folder_of(self._run)}; upload it with: {self._upload_command()}")
        elif self._run.url:
            print(f"W&B: {self._run.url}")

    def _upload_command(self) -> str:
        """Of all parts of the run, where it was continued."""
        folder = folder_of(self._run)
        # Folders of parts that begin in the same second end in -1, -2.
        return f"wandb sync {folder.parent}/*run-*-{self._run.id}*" if self._resumed else f"wandb sync {folder}"

    def _finish(self, code: int) -> None:
        try:
            self._run.finish(exit_code=code)
        except TimeoutError:
            print(f"W&B: the upload did not finish in time; complete it with: wandb sync {folder_of(self._run)}")
        if not self._run.offline:
            return
        # `finish` returns before an offline file is complete; ending W&B's service waits for that, so that the
        # command printed below works at once. Not while somebody else in this process is logging.
        if self._wandb.run is None:
            self._wandb.teardown()

    def _guard(self, action: Callable[[], Any]) -> None:
        """Do `action`; the first failure ends the logging and nothing else."""
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            print(f"W&B logging stopped ({one_line(error)}); the results are not affected.", file=sys.stderr)
            self._run = None


def folder_of(run: Any) -> Path:
    """Where W&B keeps the files of a run."""
    return Path(run.dir).parent
