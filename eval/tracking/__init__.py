"""Weights & Biases: open a W&B run, and log a running evaluation or training to it.

Logging never asks the user anything, never waits long, and works without network or home folder. If W&B fails, this is
reported on standard error and changes neither the run nor its files. docs/evaluation.md says what is logged.

The id of a folder's W&B run is stored in its file `wandb_id`, so continuing the folder continues the W&B run.
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
# Addresses of W&B's own server: since wandb 0.31, and before; older logins stored their key under the latter.
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")
ID_FILE = "wandb_id"
IDENTITY = re.compile(r"[!-~]{1,128}")  # one word
TAG_LENGTH = 64  # W&B refuses longer ones
GROUP_LENGTH = NAME_LENGTH = 128


# -- whether W&B can be reached ------------------------------------------------------------------------------------


def resolve_mode(mode: str) -> str:
    """The mode "online", "offline" or "disabled"; "auto" is decided by WANDB_MODE and by whether there is a key."""
    if mode != "auto":
        return mode
    wish = os.environ.get("WANDB_MODE", "").lower()
    if wish in ("disabled", "offline", "online"):
        return wish
    return "online" if has_key() and wish != "dryrun" else "offline"  # "dryrun" is the old name of "offline"


def has_key() -> bool:
    """Whether W&B finds a key; without one it would ask for it on a terminal, and wait."""
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
    """The kind of an error and the first line of its message, with the API key hidden."""
    text = str(error).splitlines()[0] if str(error) else "no message"
    key = os.environ.get("WANDB_API_KEY")
    return f"{type(error).__name__}: {text.replace(key, '***') if key else text}"


# -- opening a run -------------------------------------------------------------------------------------------------


def start_evaluation(
    config: RunConfig, output: Path, settings: Mapping[str, Any], resolved: Mapping[str, Any]
) -> "Tracker":
    """Begin logging an evaluation.

    Args:
        config: if `table` names the paper table that the run belongs to, it becomes the group, a tag and a setting.
        settings: what the answers depend on.
        resolved: what the run was asked to do, with the keys of result.json's `config`.
    """
    if resolve_mode(config.wandb) == "disabled":
        return Tracker()
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
        mode: see `resolve_mode`.
        output: the run's folder; W&B's files go below it unless WANDB_DIR says otherwise.
        settings: the configuration of the W&B run.
        tags: None values are left out; the tags in WANDB_TAGS are added.
        id_file: file in `output` that holds the id of the W&B run.
        group: by default runs of the same benchmark and split form a group.
        note: added to the name of the run, after the last three folders of `output`.

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
        # W&B lets arguments override variables; here a variable that the user has set overrides.
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
            # Written before W&B knows the run: after a kill in between, the next process would start a second run.
            write_file(output / id_file, f"{identity}\n")
            run = open_run(wandb, attempt, output, identity, about)
            return Tracker(wandb, run, output, resumed=bool(known))
        except Exception as error:
            print(f"W&B {attempt} failed ({one_line(error)}).", file=sys.stderr)
    return Tracker()


def known_id(file: Path) -> str:
    """The id that an earlier process wrote to a file; "" if the file is missing or holds no id."""
    try:
        text = file.read_bytes().decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return text if IDENTITY.fullmatch(text) else ""


def keep_below(output: Path) -> None:
    """Make W&B write all of its files below `output`, because the home folder may be read-only."""
    base = (output / "wandb").resolve()
    for variable, folder in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache"), ("WANDB_CONFIG_DIR", "config")):
        if not os.environ.get(variable):
            (base / folder).mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(base / folder)


def open_run(wandb: Any, mode: str, output: Path, identity: str, about: Mapping[str, Any]) -> Any:
    """Call wandb.init so that it neither asks for input nor captures the terminal.

    Args:
        identity: id of the run, new or from an earlier process.
        about: name, group, job type, tags and configuration.
    """
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=identity,
        dir=os.environ.get("WANDB_DIR", str(output)),
        mode=mode,
        # Offline parts of a run are joined by their id at the upload; `resume` concerns the server only.
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(
            init_timeout=15,
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=mode == "offline",
            finish_timeout=120,  # seconds for the upload, if the network was lost during the run
            finish_timeout_raises=True,
        ),
        **about,
    )


# -- settings and numbers ------------------------------------------------------------------------------------------

HEADLINE = ("score", "percent_of_full", "metric", "questions", "tokens_per_layer", "kv_bytes_per_question")
OFF_BUDGET = "off budget"  # tag of a run whose mean number of visual tokens misses its budget
SETTINGS = ("device", "dtype", "batch_size")  # conditions of the timing that are settings too


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation as one flat dict, including the method's budget and options.

    Hashes of many files are combined into one. An option with the name of another setting becomes "option.NAME", unless
    both have the same value.
    """
    hashed = {key: combined(settings[key]) for key in HASHED if isinstance(settings.get(key), dict)}
    named = flatten({key: value for key, value in settings.items() if key != "config"} | hashed)
    for name, value in flatten(settings["config"]).items():
        named[name if named.get(name, value) == value else f"option.{name}"] = value
    return named


def headline(result: Mapping[str, Any], output: Path) -> tuple[Any, ...]:
    """The numbers that every benchmark has, in the order of HEADLINE; missing ones are None."""
    return (
        result["metrics"].get(result["main"]),
        report.percent_of_full(result, output),
        result["main"],
        result["asked"],
        result["accounting"]["mean_tokens_per_layer"],
        result["accounting"]["kv_bytes_per_sample"],
    )


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the result, under a flat name such as "timing/batch/questions"."""
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
    if report.operations_of(result) is None:  # counted for only some of the questions, so not comparable
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
    """Logs to one W&B run. Without a run, and after a failure of W&B, its methods do nothing.

    Args:
        output: folder of the results.
        resumed: whether an earlier process logged to this run.
    """

    def __init__(self, wandb: Any = None, run: Any = None, output: Path = Path(), resumed: bool = False):
        self._wandb, self._run, self._output, self._resumed = wandb, run, output, resumed
        self._answered: int | None = None  # number of answered questions, once this process has answered any
        # Sample id -> the first samples of this process that have images; drawn when the run is complete.
        self._shown: dict[str, tuple[Sample, Answer, float | None]] = {}

    def send(self, action: Callable[[Any, Any], Any]) -> None:
        """Call `action(wandb, run)`. The first failure ends the logging, and nothing else."""
        run = self._run
        if run is None:
            return
        try:
            action(self._wandb, run)
        except Exception as error:
            print(f"W&B logging stopped ({one_line(error)}); the results are not affected.", file=sys.stderr)
            self._run = None
            with suppress(Exception):  # an open run would disturb the next run of this process
                end(self._wandb, run, 1)

    def batch(
        self,
        samples: Sequence["Sample"],
        batch: "Batch",
        sample_scores: Sequence[float],
        answered: int,
        accuracy: float | None,
    ) -> None:
        """Log a batch that was answered and stored.

        Args:
            sample_scores: score of each answer; empty if single answers have no score.
            answered: number of questions answered so far.
            accuracy: percent over these questions, or None.
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
        # The step is the number of answers, so a continued run goes on where the earlier one stopped.
        self.log(numbers, step=answered)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers of a batch or a training step."""
        self.send(lambda _, run: run.log(dict(numbers), step=step))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Log a table."""
        content = [list(row) for row in rows]
        self.send(lambda wandb, run: run.log({name: wandb.Table(columns=list(columns), data=content)}))

    def finish(self, result: Mapping[str, Any], rows: Callable[[], Sequence[Sequence[Any]]]) -> None:
        """Log the result of a complete run.

        Args:
            rows: returns the rows of the sample table in the order of COLUMNS; "image" is an image, several or None,
                and "kept tokens" is None.
        """
        new = self._answered is not None or not self._resumed
        if not new and result["partial"]:
            return  # a look at the first few questions must not replace the numbers of all questions
        self.send(lambda _, run: self._summarise(run, result))
        if new:
            self.send(lambda _, run: run.log(self._drawn(rows()), step=self._answered))

    def _summarise(self, run: Any, result: Mapping[str, Any]) -> None:
        short = dict(zip(HEADLINE, headline(result, self._output), strict=True))
        run.summary.update(
            numbers_of(result)
            | {name: value for name, value in short.items() if value is not None}
            | {"sentence": result["sentence"], "commit": result["commit"]}
            | {"tokens": report.tokens_text(result["accounting"])}
            | ({} if (gain := report.gain_beside(result, self._output)) is None else {"visual_gain_kept": gain})
            | {"off_budget": result["off_budget"]["remark"] if result["off_budget"] else ""}
        )
        tags = [tag for tag in run.tags or () if tag != OFF_BUDGET]  # the tag may come from fewer questions
        run.tags = (*tags, OFF_BUDGET) if result["off_budget"] else tuple(tags)
        conditions = {key: value for key, value in result["conditions"].items() if key not in SETTINGS}
        run.config.update({"versions": result["versions"], **conditions}, allow_val_change=True)

    def _drawn(self, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """The sample table with small images and overlays, and a gallery of images next to their kept tokens."""
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
        """End the W&B run and print where it is; always called last."""
        self.send(lambda wandb, run: end(wandb, run, int(failed)))
        if self._run is None:
            return
        if self._run.offline:
            folder = folder_of(self._run)
            # The pattern covers all parts of a continued run; parts that began in the same second end in -1, -2.
            parts = f"{folder.parent}/*run-*-{self._run.id}*" if self._resumed else folder
            print(f"W&B: offline run in {folder}; upload it with: wandb sync {parts}")
        elif self._run.url:
            print(f"W&B: {self._run.url}")


def end(wandb: Any, run: Any, code: int) -> None:
    """Finish the run and wait until its file is complete."""
    try:
        run.finish(exit_code=code)
    except TimeoutError:
        print(f"W&B: the upload did not finish in time; complete it with: wandb sync {folder_of(run)}")
    # `finish` returns before an offline file is complete. Ending W&B's service waits for the file, so that the printed
    # command works at once. The service is not ended while another run of this process is logging.
    if run.offline and wandb.run is None:
        wandb.teardown()


def folder_of(run: Any) -> Path:
    """The folder of a run's W&B files."""
    return Path(run.dir).parent
