"""Weights & Biases: settings, progress, final numbers, a table of samples and overlays of kept tokens.

Logging never asks a question, never waits long, and works without network or home folder. A failure of W&B is reported
on standard error and changes neither the run nor its files.

A folder's W&B run has a fixed id, kept in its file `wandb_id`: continuing the folder continues the W&B run.
"""

import netrc
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from eval.answers import flatten
from eval.config import RunConfig
from eval.results import baseline

if TYPE_CHECKING:
    from llava.processing.sample import Sample
from llava.pipeline.answer import Answer, Batch

PROJECT = "visual-token-reduction"
ID_FILE = "wandb_id"
TABLE_ROWS = 200
TABLE_PICTURES = 32  # rows of the sample table with images
PICTURES = 8
SIDE = 448  # longest side of an image in the sample table
COLUMNS = (
    "question_id",
    "picture",
    "kept tokens",
    "question",
    "reference",
    "answer",
    "credit",
    "tokens per layer",
)
HEADLINE = ("score", "percent_of_full", "metric", "questions", "tokens_per_layer", "kv_bytes_per_question")
SETTINGS = ("device", "dtype", "batch_size")  # conditions of the timing that are settings as well
TAG_LENGTH = 64  # W&B refuses longer ones


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
        self._drawn: dict[str, tuple[Sample, Answer, float | None]] = {}

    def batch(
        self,
        samples: Sequence["Sample"],
        batch: "Batch",
        credits: Sequence[float],
        answered: int,
        accuracy: float | None,
    ) -> None:
        known: Sequence[float | None] = credits or [None] * len(samples)
        for sample, answer, credit in zip(samples, batch.answers, known, strict=True):
            if len(self._drawn) < TABLE_PICTURES and sample.image is not None:
                self._drawn[sample.id] = (sample, answer, credit)
        self._answered = answered
        numbers = {
            "progress/answered": answered,
            **({} if accuracy is None else {"progress/accuracy": accuracy}),
            "progress/batch_size": len(samples),
            "progress/batch_ttft_ms": 1000 * batch.timing.ttft,
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
            self._guard(lambda: self._log_samples(rows()))
            self._guard(self._log_pictures)

    def _summarise(self, result: Mapping[str, Any]) -> None:
        short = dict(zip(HEADLINE, headline(result, self._output), strict=True))
        self._run.summary.update(
            numbers_of(result)
            | {name: value for name, value in short.items() if value is not None}
            | {"sentence": result["sentence"], "commit": result["commit"]}
        )
        conditions = {key: value for key, value in result["conditions"].items() if key not in SETTINGS}
        self._run.config.update({"versions": result["versions"], **conditions}, allow_val_change=True)

    def _log_samples(self, rows: Sequence[Sequence[Any]]) -> None:
        from eval.figures.overlay_tiles import draw_answer, draw_original

        data = []
        for name, picture, kept, *rest in rows:
            if picture is not None:
                picture = self._thumbnails([draw_original(one) for one in images_of(picture)])
            if name in self._drawn:
                sample, answer, _ = self._drawn[name]
                kept = self._thumbnails(draw_answer(sample, answer))
            data.append([name, picture, kept, *rest])
        self._run.log({"samples": self._wandb.Table(columns=list(COLUMNS), data=data)}, step=self._answered)

    def _thumbnails(self, pictures: Sequence[Any]) -> Any:
        """Images side by side, small enough for a table."""
        from eval.figures.overlay_tiles import beside

        picture = beside(pictures)
        picture.thumbnail((SIDE * len(pictures), SIDE))
        return self._wandb.Image(picture, file_type="jpg")

    def _log_pictures(self) -> None:
        """The first images of this process, each beside the tokens that were kept of it."""
        from eval.figures.overlay_tiles import beside, draw_answer, draw_original

        pictures = []
        for sample, answer, credit in list(self._drawn.values())[:PICTURES]:
            tokens = f"{answer.accounting.mean:.0f} of {answer.accounting.visual_tokens} tokens"
            verdict = "" if credit is None else "right, " if credit == 1 else "wrong, "
            caption = f"{sample.question} {answer.text} ({verdict}{tokens})"
            for original, overlay in zip(sample.images, draw_answer(sample, answer), strict=True):
                pictures.append(self._wandb.Image(beside([draw_original(original), overlay]), caption=caption))
        if pictures:
            self._run.log({"kept tokens": pictures}, step=self._answered)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        content = [list(row) for row in rows]
        self._guard(lambda: self._run.log({name: self._wandb.Table(columns=list(columns), data=content)}))

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
        return f"wandb sync {folder.parent}/*run-*-{self._run.id}" if self._resumed else f"wandb sync {folder}"

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


def start_evaluation(
    config: RunConfig, output: Path, settings: Mapping[str, Any], resolved: Mapping[str, Any]
) -> Tracker:
    """Begin logging an evaluation.

    Args:
        settings: what its answers depend on.
        resolved: what the run was asked to do, under the names of result.json's `config`.
    """
    about = flat(settings) | {name: value for name, value in resolved.items() if name != "options"}
    about |= {"checkpoint": str(config.model)}
    tags = [about.get(key) for key in ("benchmark", "split", "model", "method", "profile")]
    tags.append(f"budget {about.get('budget')}")
    return start(config.wandb, output, about, job_type="evaluation", tags=tags)


def start(
    mode: str,
    output: Path,
    settings: Mapping[str, Any],
    job_type: str = "training",
    tags: Sequence[Any] = (),
    id_file: str = ID_FILE,
) -> Tracker:
    """Begin logging.

    Args:
        mode: "auto" lets WANDB_MODE decide, else online if there is a key and offline if not; or "online",
            "offline", "disabled".
        output: the run's folder; the W&B files go below it unless WANDB_DIR says otherwise.
        settings: become the run's configuration; runs of the same benchmark and split are a group.
        tags: those that are None are left out.
        id_file: file in `output` that holds the id of the W&B run.
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
    about = {
        "name": "/".join(output.parts[-3:]),
        "group": f"{settings.get('benchmark')}-{settings.get('split')}",
        "job_type": job_type,
        "tags": list(dict.fromkeys(str(tag)[:TAG_LENGTH] for tag in tags if tag is not None)),
        "config": dict(settings),
    }
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            identity, resumed = run_id(output / id_file)
            run = open_run(wandb, attempt, output, identity, **about)
            (output / id_file).write_text(f"{identity}\n")
            return WandbTracker(wandb, run, output, resumed)
        except Exception as error:
            print(f"W&B {attempt} failed ({one_line(error)}).", file=sys.stderr)
    return Tracker()


def run_id(file: Path) -> tuple[str, bool]:
    """The id of a folder's W&B run, and whether an earlier process has used it."""
    known = file.read_text().strip() if file.is_file() else ""
    return known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(6), bool(known)


def open_run(wandb: Any, mode: str, output: Path, identity: str, **about: Any) -> Any:
    """wandb.init that neither asks nor captures the terminal.

    Args:
        identity: the id of the run, new or of an earlier process.
    """
    # Offline parts of a run are joined by their id when they are uploaded; `resume` is for the server.
    resume = {"resume": "allow"} if mode == "online" else {}
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=identity,
        dir=os.environ.get("WANDB_DIR", str(output)),
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
        **resume,
        **about,
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


def flat(settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Settings of an evaluation on one level, the method's budget and options among them.

    An option that has the name of another setting becomes "option.NAME", unless it has the same value.
    """
    found = flatten({key: value for key, value in settings.items() if key != "config"}) | more
    for name, value in flatten(settings["config"]).items():
        found[name if found.get(name, value) == value else f"option.{name}"] = value
    return found


def headline(result: Mapping[str, Any], output: Path) -> tuple[Any, ...]:
    """The numbers that every benchmark has, in the order of HEADLINE; None where there is none."""
    return (
        result["metrics"].get(result["main"]),
        baseline.percent_of_full(result, output),
        result["main"],
        result["asked"],
        result["audit"]["mean_tokens_per_layer"],
        result["audit"]["kv_bytes_per_sample"],
    )


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the result by a flat name."""
    tree = {key: result[key] for key in ("metrics", "confidence", "audit", "timing", "flops")}
    numbers = {
        name.replace(".", "/"): value
        for name, value in flatten(tree).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    throughput = result.get("throughput") or {}
    for name in ("questions_per_second", "start_seconds"):
        if throughput.get(name) is not None:
            numbers[f"throughput/{name}"] = throughput[name]
    for part in throughput.get("ranks", ()):
        numbers[f"throughput/rank {part['rank']}/questions_per_second"] = part["questions_per_second"]
    numbers["failed"] = len(result.get("failed", ()))
    for layer, tokens in enumerate(result["audit"]["entering_per_layer"]):
        numbers[f"audit/entering/layer {layer}"] = tokens
    return numbers


def images_of(picture: Any) -> tuple[Any, ...]:
    """The images of a sample, of which there may be several."""
    return picture if isinstance(picture, tuple) else (picture,)


def folder_of(run: Any) -> Path:
    """Where W&B keeps the files of a run."""
    return Path(run.dir).parent


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
