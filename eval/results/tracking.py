"""Weights & Biases: settings, progress, metrics, audit, timing, a table of samples and pictures of kept tokens.

Logging is a courtesy: it never asks a question, never waits long, works without network or home folder, and whatever
goes wrong with it leaves the run and its files alone.
"""

import netrc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from eval.answers import flatten

if TYPE_CHECKING:
    from llava.processing.sample import Sample
from llava.pipeline.answer import Batch

PROJECT = "visual-token-reduction"
TABLE_ROWS = 200
PICTURES = 8
COLUMNS = ("question_id", "question", "reference", "answer", "credit", "tokens per layer")


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
        """One batch is stored; `accuracy` (percent) is over all `answered` questions so far, None without credits."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of a training step."""

    def finish(self, result: Mapping[str, Any], rows: Sequence[Sequence[Any]]) -> None:
        """The run is complete."""

    def close(self, failed: bool) -> None:
        """Always called last."""


class WandbTracker(Tracker):
    """Logging to one W&B run."""

    def __init__(self, wandb: Any, run: Any):
        self._wandb = wandb
        self._run = run
        self._pictures: list[tuple[Sample, Any, float | None]] = []

    def batch(
        self,
        samples: Sequence["Sample"],
        batch: "Batch",
        credits: Sequence[float],
        answered: int,
        accuracy: float | None,
    ) -> None:
        for sample, answer, credit in zip(samples, batch.answers, credits or [None] * len(samples), strict=True):
            if len(self._pictures) < PICTURES and sample.image is not None:
                self._pictures.append((sample, answer, credit))
        count = len(samples)
        numbers = {
            "progress/answered": answered,
            **({} if accuracy is None else {"progress/accuracy": accuracy}),
            "progress/ttft_ms": 1000 * batch.timing.ttft / count,
            "progress/decode_ms": 1000 * batch.timing.decode / count,
        }
        self._guard(lambda: self._run.log(numbers))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._guard(lambda: self._run.log(dict(numbers), step=step))

    def finish(self, result: Mapping[str, Any], rows: Sequence[Sequence[Any]]) -> None:
        def log() -> None:
            self._run.log(numbers_of(result))
            self._run.summary.update({"sentence": result["sentence"], "commit": result["commit"]})
            self._run.config.update({"versions": result["versions"], "conditions": result["conditions"]})
            self._run.log({"samples": self._wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows])})

        self._guard(log)
        self._guard(self._log_pictures)

    def _log_pictures(self) -> None:
        from eval.figures.overlay_tiles import draw_answer

        pictures = []
        for sample, answer, credit in self._pictures:
            tokens = f"{answer.audit.mean:.0f} of {answer.audit.visual_tokens} tokens"
            verdict = "" if credit is None else "right, " if credit == 1 else "wrong, "
            caption = f"{sample.question} {answer.text} ({verdict}{tokens})"
            for overlay in draw_answer(sample, answer):
                pictures.append(self._wandb.Image(overlay, caption=caption))
        if pictures:
            self._run.log({"kept tokens": pictures})

    def close(self, failed: bool) -> None:
        self._guard(lambda: self._finish(int(failed)))
        if self._run is None:
            return
        if self._run.offline:
            folder = Path(self._run.dir).parent
            print(f"W&B: offline run in {folder}; upload it with: wandb sync {folder}")
        elif self._run.url:
            print(f"W&B: {self._run.url}")

    def _finish(self, code: int) -> None:
        folder = Path(self._run.dir).parent
        try:
            self._run.finish(exit_code=code)
        except TimeoutError:
            print(f"W&B: the upload did not finish in time; complete it with: wandb sync {folder}")
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


def start(mode: str, output: Path, settings: Mapping[str, Any]) -> Tracker:
    """Begin logging.

    Args:
        mode: "auto" lets WANDB_MODE decide, else online if there is a key and offline if not; or "online",
            "offline", "disabled".
        output: the run's folder; the W&B files go below it unless WANDB_DIR says otherwise.
        settings: become the run's configuration.
    """
    mode = resolve_mode(mode)
    if mode == "disabled":
        return Tracker()
    try:
        keep_below(output)
        import wandb
    except Exception as error:
        print(f"W&B is not available ({one_line(error)}); the run goes on without it.", file=sys.stderr)
        return Tracker()
    if mode == "online" and not has_key():
        print("W&B has no API key (WANDB_API_KEY or netrc); logging offline.", file=sys.stderr)
        mode = "offline"
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return WandbTracker(wandb, open_run(wandb, attempt, output, settings))
        except Exception as error:
            print(f"W&B {attempt} failed ({one_line(error)}).", file=sys.stderr)
    return Tracker()


def open_run(wandb: Any, mode: str, output: Path, settings: Mapping[str, Any]) -> Any:
    """wandb.init that neither asks nor captures the terminal."""
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name="/".join(output.parts[-3:]),
        group=f"{settings.get('benchmark')}-{settings.get('split')}",
        dir=os.environ.get("WANDB_DIR", str(output)),
        config=dict(settings),
        mode=mode,
        settings=wandb.Settings(
            init_timeout=15,
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=mode == "offline",
            finish_timeout=120,  # seconds for the upload when the network went away during the run
            finish_timeout_raises=True,
        ),
    )


def resolve_mode(mode: str) -> str:
    """One of "online", "offline", "disabled"."""
    if mode != "auto":
        return mode
    wish = os.environ.get("WANDB_MODE", "").lower()
    if wish in ("disabled", "offline", "online"):
        return wish
    if wish == "dryrun":  # the old name
        return "offline"
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B can log in without asking: on a terminal it would ask, and wait."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def keep_below(output: Path) -> None:
    """Give W&B folders it may write: by default some of its files go to the home folder, which may be read-only."""
    base = (output / "wandb").resolve()
    for variable, folder in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache"), ("WANDB_CONFIG_DIR", "config")):
        if not os.environ.get(variable):
            (base / folder).mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(base / folder)


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the result as one flat history row."""
    tree = {key: result[key] for key in ("metrics", "confidence", "audit", "timing")}
    numbers = {
        name.replace(".", "/"): value
        for name, value in flatten(tree).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for layer, tokens in enumerate(result["audit"]["entering_per_layer"]):
        numbers[f"audit/entering/layer {layer}"] = tokens
    return numbers


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
