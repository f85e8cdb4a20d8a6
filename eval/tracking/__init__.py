"""Weights & Biases: a run, how it is opened, and what a running evaluation or training tells it.

Logging never asks a question, never waits long, and works without network or home folder. A failure of W&B is reported
on standard error and changes neither the run nor its files. docs/evaluation.md says what is logged.

A folder's W&B run has a fixed id, kept in its file `wandb_id`: continuing the folder continues the W&B run.
"""

import netrc
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from eval.answers.jsonl import write_file
from eval.answers.source_hash import HASHED, combined, flatten
from eval.config import RunConfig, changed_fields, changed_options
from eval.results import report
from llava.budget import RETENTION_RATIO, budget_text
from llava.errors import UserError, optional_imports

if TYPE_CHECKING:
    from llava.pipeline.accounting import Answer, Batch
    from llava.processing.prompt import Sample

PROJECT = "visual-token-reduction"
# W&B's own server: its address since wandb 0.31, and the one under which older logins stored their key.
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")
ID_FILE = "wandb_id"
IDENTITY = re.compile(r"[!-~]{1,128}")  # one word
TAG_LENGTH = 64  # W&B refuses longer ones
GROUP_LENGTH = NAME_LENGTH = 128


# -- whether W&B can be reached ------------------------------------------------------------------------------------


def resolve_mode(mode: str) -> str:
    """One of "online", "offline", "disabled"."""
    if mode != "auto":
        return mode
    wish = os.environ.get("WANDB_MODE", "").lower()
    if wish in ("disabled", "offline", "online"):
        return wish
    return "online" if has_key() and wish != "dryrun" else "offline"  # "dryrun" is the old name of "offline"


def has_key() -> bool:
    """Whether W&B can log in without asking: on a terminal it would ask, and wait."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname
    hosts = HOSTS if host in (None, *HOSTS) else (host,)
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.netrc(str(file))
        return any(known.authenticators(name) is not None for name in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, without the API key should it be in there."""
    text = str(error).splitlines()[0] if str(error) else "no message"
    key = os.environ.get("WANDB_API_KEY")
    return f"{type(error).__name__}: {text.replace(key, '***') if key else text}"


# -- opening a run -------------------------------------------------------------------------------------------------


def start_evaluation(
    config: RunConfig, output: Path, settings: Mapping[str, Any], resolved: Mapping[str, Any]
) -> "Tracker":
    """Begin logging an evaluation.

    Args:
        config: its `table` names the paper table that the run is a cell of: the group, a tag and a setting.
        settings: what its answers depend on.
        resolved: what the run was asked to do, under the names of result.json's `config`.
    """
    about = flat(settings) | {name: value for name, value in resolved.items() if name != "options"}
    about |= {"checkpoint": str(config.model), "table": config.table}
    tags = [about.get(key) for key in ("benchmark", "split", "model", "method", "profile")]
    tags += [f"budget {budget_text(about.get('budget'), about.get(RETENTION_RATIO))}", config.table]
    differing = changed_options(settings["method"], settings["config"])
    differing += [f"{name}={value}" for name, value in flatten(changed_fields(config)).items()]
    return start(
        config.wandb, output, about, job_type="evaluation", tags=[*tags, *differing], group=config.table, note=differing
    )


def start(
    mode: str,
    output: Path,
    settings: Mapping[str, Any],
    job_type: str = "training",
    tags: Sequence[Any] = (),
    id_file: str = ID_FILE,
    group: str | None = None,
    note: Sequence[str] = (),
) -> "Tracker":
    """Begin logging.

    Args:
        mode: "auto" lets WANDB_MODE decide, else online if there is a key and offline if not; or "online",
            "offline", "disabled".
        output: the run's folder; the W&B files go below it unless WANDB_DIR says otherwise.
        settings: become the run's configuration.
        tags: those that are None are left out; those of WANDB_TAGS are added.
        id_file: file in `output` that holds the id of the W&B run.
        group: None groups runs of the same benchmark and split.
        note: what the name says besides the last three folders of `output`.

    WANDB_RUN_GROUP, WANDB_JOB_TYPE and WANDB_NAME replace the group, the job type and the name.
    """
    mode = resolve_mode(mode)
    if mode == "disabled":
        return Tracker()
    try:
        keep_below(output)
        with optional_imports():
            import wandb
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"W&B is not available ({one_line(error)})."
        print(f"{reason} The run goes on without W&B.", file=sys.stderr)
        return Tracker()
    if mode == "online" and not has_key():
        print("W&B has no API key (WANDB_API_KEY or netrc); logging offline.", file=sys.stderr)
        mode = "offline"
    tags = [*tags, *filter(None, os.environ.get("WANDB_TAGS", "").split(","))]
    group = group or f"{settings.get('benchmark')}-{settings.get('split')}"
    about = {
        # W&B prefers arguments to variables; whoever sets a variable wants it to hold.
        "name": os.environ.get("WANDB_NAME") or " ".join(["/".join(output.parts[-3:]), *note])[:NAME_LENGTH],
        "group": (os.environ.get("WANDB_RUN_GROUP") or group)[:GROUP_LENGTH],
        "job_type": os.environ.get("WANDB_JOB_TYPE") or job_type,
        "tags": list(dict.fromkeys(str(tag)[:TAG_LENGTH] for tag in tags if tag is not None)),
        "config": dict(settings),
    }
    known = known_id(output / id_file)
    identity = known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(6)
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            # Before W&B knows the run: a process that is killed in between would leave it a second one.
            write_file(output / id_file, f"{identity}\n")
            run = open_run(wandb, attempt, output, identity, about)
            return Tracker(wandb, run, output, resumed=bool(known))
        except Exception as error:
            print(f"W&B {attempt} failed ({one_line(error)}).", file=sys.stderr)
    return Tracker()


def known_id(file: Path) -> str:
    """The id that an earlier process has written to a file; "" where there is none, or something that is no id."""
    try:
        text = file.read_bytes().decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return text if IDENTITY.fullmatch(text) else ""


def keep_below(output: Path) -> None:
    """Give W&B folders it may write: by default some of its files go to the home folder, which may be read-only."""
    base = (output / "wandb").resolve()
    for variable, folder in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache"), ("WANDB_CONFIG_DIR", "config")):
        if not os.environ.get(variable):
            (base / folder).mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(base / folder)


def open_run(wandb: Any, mode: str, output: Path, identity: str, about: Mapping[str, Any]) -> Any:
    """wandb.init that neither asks nor captures the terminal.

    Args:
        identity: the id of the run, new or of an earlier process.
        about: its name, group, job type, tags and configuration.
    """
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=identity,
        dir=os.environ.get("WANDB_DIR", str(output)),
        mode=mode,
        # Offline parts of a run are joined by their id when they are uploaded; `resume` is for the server.
        resume="allow" if mode == "online" else None,
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
        **about,
    )


# -- settings and numbers ------------------------------------------------------------------------------------------

HEADLINE = ("score", "percent_of_full", "metric", "questions", "tokens_per_layer", "kv_bytes_per_question")
OFF_BUDGET = "off budget"  # tag of a run whose mean of visual tokens is not its budget
SETTINGS = ("device", "dtype", "batch_size")  # conditions of the timing that are settings as well


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an evaluation on one level, the method's budget and options among them.

    Hashes of many files become one. An option that has the name of another setting becomes "option.NAME", unless it has
    the same value.
    """
    hashed = {key: combined(settings[key]) for key in HASHED if isinstance(settings.get(key), dict)}
    named = flatten({key: value for key, value in settings.items() if key != "config"} | hashed)
    for name, value in flatten(settings["config"]).items():
        named[name if named.get(name, value) == value else f"option.{name}"] = value
    return named


def headline(result: Mapping[str, Any], output: Path) -> tuple[Any, ...]:
    """The numbers that every benchmark has, in the order of HEADLINE; None where there is none."""
    return (
        result["metrics"].get(result["main"]),
        report.percent_of_full(result, output),
        result["main"],
        result["asked"],
        result["accounting"]["mean_tokens_per_layer"],
        result["accounting"]["kv_bytes_per_sample"],
    )


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the result by a flat name."""
    tree = {key: result[key] for key in ("metrics", "confidence", "accounting", "timing", "flops")}
    numbers = {
        name.replace(".", "/"): value
        for name, value in flatten(tree).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    throughput = result["throughput"]
    if throughput["questions_per_second"] is not None:
        numbers["throughput/questions_per_second"] = throughput["questions_per_second"]
    for part in throughput["ranks"]:
        numbers[f"throughput/rank {part['rank']}/questions_per_second"] = part["questions_per_second"]
    numbers["failed"] = len(result["failed"])
    if report.operations_of(result) is None:  # of fewer questions than other runs
        numbers.pop("flops/per_question", None)
    for layer, tokens in enumerate(result["accounting"]["entering_per_layer"]):
        numbers[f"accounting/entering/layer {layer}"] = tokens
    return numbers


# -- logging -------------------------------------------------------------------------------------------------------

TABLE_ROWS = 200
TABLE_IMAGES = 32  # rows of the sample table with images
IMAGES = 8
SIDE = 448  # longest side of an image in the sample table
COLUMNS = ("question_id", "image", "kept tokens", "question", "reference", "answer", "sample_score", "tokens per layer")


class Tracker:
    """Logging to one W&B run; without one, and after a failure of W&B, every function does nothing.

    Args:
        output: the folder that the results are in.
        resumed: an earlier process logged to this run.
    """

    def __init__(self, wandb: Any = None, run: Any = None, output: Path = Path(), resumed: bool = False):
        self._wandb, self._run, self._output, self._resumed = wandb, run, output, resumed
        self._answered: int | None = None  # questions, once this process has answered any
        # The first samples of this process that have images, by id; drawn when the run is complete.
        self._shown: dict[str, tuple[Sample, Answer, float | None]] = {}

    def send(self, action: Callable[[Any, Any], Any]) -> None:
        """Call `action(wandb, run)`; the first failure ends the logging and nothing else."""
        run = self._run
        if run is None:
            return
        try:
            action(self._wandb, run)
        except Exception as error:
            print(f"W&B logging stopped ({one_line(error)}); the results are not affected.", file=sys.stderr)
            self._run = None
            with suppress(Exception):  # left open, it would spoil the next run of this process
                end(self._wandb, run, 1)

    def batch(
        self,
        samples: Sequence["Sample"],
        batch: "Batch",
        sample_scores: Sequence[float],
        answered: int,
        accuracy: float | None,
    ) -> None:
        """One batch is stored.

        Args:
            sample_scores: score of each answer; empty where the benchmark has none for single answers.
            accuracy: percent, over all `answered` questions so far, or None.
        """
        if self._run is None:
            return
        scores: Sequence[float | None] = sample_scores or [None] * len(samples)
        for sample, answer, sample_score in zip(samples, batch.answers, scores, strict=True):
            if len(self._shown) < TABLE_IMAGES and answer.runs:
                self._shown[sample.id] = (sample, answer, sample_score)
        self._answered = answered
        numbers = {
            "progress/answered": answered,
            "progress/batch_size": len(samples),
            "progress/batch_prefill_ms": 1000 * batch.timing.prefill,
            "progress/batch_decode_ms": 1000 * batch.timing.decode,
        }
        if accuracy is not None:
            numbers["progress/accuracy"] = accuracy
        # The number of answers as the step: a continued run goes on where the earlier one stopped.
        self.log(numbers, step=answered)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of a batch or a training step."""
        self.send(lambda _, run: run.log(dict(numbers), step=step))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table of its own."""
        content = [list(row) for row in rows]
        self.send(lambda wandb, run: run.log({name: wandb.Table(columns=list(columns), data=content)}))

    def finish(self, result: Mapping[str, Any], rows: Callable[[], Sequence[Sequence[Any]]]) -> None:
        """The run is complete.

        Args:
            rows: returns the sample table in the order of COLUMNS, the image or None and None for the kept tokens.
        """
        new = self._answered is not None or not self._resumed
        if not new and result["partial"]:
            return  # the run of all questions keeps its numbers when the first few are looked at again
        self.send(lambda _, run: self._summarise(run, result))
        if new:
            self.send(lambda _, run: run.log(self._drawn(rows()), step=self._answered))

    def _summarise(self, run: Any, result: Mapping[str, Any]) -> None:
        short = dict(zip(HEADLINE, headline(result, self._output), strict=True))
        run.summary.update(
            numbers_of(result)
            | {name: value for name, value in short.items() if value is not None}
            | {"sentence": result["sentence"], "commit": result["commit"]}
            | {"off_budget": result["off_budget"]["remark"] if result["off_budget"] else ""}
        )
        tags = [tag for tag in run.tags or () if tag != OFF_BUDGET]  # it may be of fewer questions
        run.tags = (*tags, OFF_BUDGET) if result["off_budget"] else tuple(tags)
        conditions = {key: value for key, value in result["conditions"].items() if key not in SETTINGS}
        run.config.update({"versions": result["versions"], **conditions}, allow_val_change=True)

    def _drawn(self, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """The sample table with small images and overlays, and the first images beside what was kept of them."""
        from eval.figures.overlay import beside, draw_answer, draw_original

        def thumbnails(images: Sequence[Any]) -> Any:
            sheet = beside(images)
            sheet.thumbnail((SIDE * len(images), SIDE))
            return self._wandb.Image(sheet, file_type="jpg")

        data = []
        for name, image, kept, *rest in rows:
            if image is not None:
                several = image if isinstance(image, tuple) else (image,)
                image = thumbnails([draw_original(one) for one in several])
            if name in self._shown:
                sample, answer, _ = self._shown[name]
                kept = thumbnails(draw_answer(sample, answer))
            data.append([name, image, kept, *rest])
        gallery = []
        for sample, answer, sample_score in list(self._shown.values())[:IMAGES]:
            tokens = f"{answer.accounting.mean:.0f} of {answer.accounting.visual_tokens} tokens"
            verdict = "" if sample_score is None else "right, " if sample_score == 1 else "wrong, "
            caption = f"{sample.question} {answer.text} ({verdict}{tokens})"
            for original, overlay in zip(sample.images, draw_answer(sample, answer), strict=True):
                gallery.append(self._wandb.Image(beside([draw_original(original), overlay]), caption=caption))
        table = self._wandb.Table(columns=list(COLUMNS), data=data)
        return {"samples": table} | ({"kept tokens": gallery} if gallery else {})

    def close(self, failed: bool) -> None:
        """Always called last."""
        self.send(lambda wandb, run: end(wandb, run, int(failed)))
        if self._run is None:
            return
        if self._run.offline:
            folder = folder_of(self._run)
            # All parts of a continued run; folders of parts that begin in the same second end in -1, -2.
            parts = f"{folder.parent}/*run-*-{self._run.id}*" if self._resumed else folder
            print(f"W&B: offline run in {folder}; upload it with: wandb sync {parts}")
        elif self._run.url:
            print(f"W&B: {self._run.url}")


def end(wandb: Any, run: Any, code: int) -> None:
    """Finish the run, and leave its file complete."""
    try:
        run.finish(exit_code=code)
    except TimeoutError:
        print(f"W&B: the upload did not finish in time; complete it with: wandb sync {folder_of(run)}")
    # `finish` returns before an offline file is complete; ending W&B's service waits for that, so that the command
    # that is printed works at once. Not while somebody else in this process is logging.
    if run.offline and wandb.run is None:
        wandb.teardown()


def folder_of(run: Any) -> Path:
    """Where W&B keeps the files of a run."""
    return Path(run.dir).parent
