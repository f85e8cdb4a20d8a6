"""Build the wheels, install them into an empty environment, and run every `vtr` command from an empty folder.

    python scripts/dev/wheel.py FOLDER [PYTHON]     # PYTHON: the interpreter of the environment; python3 if left out

FOLDER gets dist/ (wheel, source distribution and toy wheel), the environment env/ and the working folder empty/, some
GB if the package index has CUDA builds of torch. The core is tried alone first, then with the extras. The exit code is
1 if a command ends in a traceback or with another code than expected here. FOLDER/log has the output of all commands.
"""

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from eval.cli import COMMANDS, LAB  # noqa: E402

# A wheel has no lab/.
INSTALLED = COMMANDS.keys() - {name for lines in LAB.values() for name in lines}

MAIN, TOY = "visual_token_reduction", "visual_token_reduction_toy"
EXTRAS = "eval,pages"
SECONDS = 900  # for a command
SOURCE_BYTES = 4 * 2**20  # the largest source distribution, which carries no assets
# The arguments of `vtr` that work with the core alone. All others must end in one sentence.
CORE = ("--help", "--version", "show methods", "show methods consensusdrop")
RUN = "--limit 8 --wandb disabled --method"
RUNS = "results/full/limit8 results/consensusdrop/limit8"
IMAGE = "{toy}/eval/gqa/data/images/test00012d.jpg"
# Command -> pairs of arguments and exit code: 0, or 2 if a checkout, a server or an account is needed.
CALLS = {
    "eval": [
        (f"{RUN} consensusdrop --budget 64 --output results/consensusdrop", 0),
        (f"{RUN} full --output results/full", 0),
        (f"{RUN} full --benchmark pope", 0),
    ],
    "score": [("gqa --partial --answers results/full/answers.jsonl", 0)],
    "compare": [(RUNS, 0)],
    "stats": [(RUNS, 0)],
    "run-vlmeval": [("consensusdrop 64 -- run.py", 2)],
    "recommend": [("gqa --limit 180 --loss 20 --method uniform --budget 192", 0)],
    "report": [("results", 0)],
    "leaderboard": [("results", 0)],
    "submit check": [("results/full --full results/full", 1)],  # an installation is no commit
    "submit replay": [("kept.jsonl --full results/full --output again", 2)],  # there is no such file
    "gallery": [(f"{IMAGE} red --methods consensusdrop --budgets 64", 0)],
    "demo": [("--port {taken}", 2)],
    "serve-client": [(f"consensusdrop 64 --image {IMAGE} --question red --url http://127.0.0.1:9", 2)],
    "export": [(f"out.safetensors consensusdrop 64 --image {IMAGE} --question red", 0)],
    "show": [("methods", 0), ("benchmarks", 0), ("models", 0), ("methods consensusdrop", 0)],
    "check-data": [("{toy}/eval", 0)],
    "wandb sync": [("results", 0)],
    "wandb workspace": [("me/project --dry-run", 2)],
    "wandb report": [("me/project --dry-run", 2)],
    "tables paper": [("consensusdrop/ablation --limit 2 --wandb disabled", 0)],
    "bench latency": [("--method consensusdrop --budget 64 --repeats 1 --lengths 0 --no-oracle", 0)],
    "bench turns": [("--method divprune --budget 64 --limit 20", 0)],
    "new": [("method something", 2)],
    "check": [("method consensusdrop", 2)],
}
REDUCE = """
import sys
from llava import reduce
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.image_utils import load_image
folder, image = sys.argv[1:]
model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
inputs = processor(images=load_image(image), text="USER: <image>\\nIs it red? ASSISTANT:", return_tensors="pt")
with reduce(model, "consensusdrop", budget=64) as reduced:
    model.generate(**inputs, max_new_tokens=4)
assert set(reduced.accounting[0].tokens_per_layer) == {64}, reduced.accounting
"""

# Without PYTHONPATH, which could bring in packages from elsewhere, perhaps this project.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WANDB_API_KEY")}


class Trial:
    """The environment and the empty folder in which commands run.

    Attributes:
        failures: a sentence for each command that went wrong.
    """

    def __init__(self, folder: Path, python: str):
        self.folder, self.work, self.failures = folder, folder / "empty", list[str]()
        self.log = folder / "log"
        self.log.write_text("")
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        self.python = folder / "env" / "bin" / "python"
        subprocess.run([python, "-m", "venv", "--clear", folder / "env"], check=True)

    def install(self, *what: str) -> None:
        """Install with pip; if pip fails, the trial ends."""
        print("pip install", *(name.rpartition("/")[2] for name in what), flush=True)
        command = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
        subprocess.run(command, check=True, env=ENVIRONMENT)

    def call(self, command: list[str | Path], codes: tuple[int, ...], sentence: bool = False) -> str:
        """Run a command in the empty folder; returns its output.

        Args:
            codes: exit codes that are right.
            sentence: if the exit code is not 0, the last line must say what to install.
        """
        words = " ".join(map(str, command)).replace(f"{self.folder}/", "").strip()[:160]
        print(words.partition("\n")[0], flush=True)
        try:
            done = subprocess.run(
                list(map(str, command)), cwd=self.work, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            self.failures.append(f"{words}: not done after {SECONDS} seconds")
            return ""
        output = done.stdout + done.stderr
        with self.log.open("a") as log:
            log.write(f"$ {words}\n{output}exit code {done.returncode}\n\n")
        last = output.strip().rpartition("\n")[2]
        if "Traceback" in output or done.returncode not in codes:
            self.failures.append(f"{words}: exit code {done.returncode}, not {codes}: {last}")
        elif sentence and done.returncode and "pip install" not in last:
            self.failures.append(f"{words}: no word about what to install: {last}")
        return output

    def vtr(self, command: str, codes: tuple[int, ...], sentence: bool = False) -> str:
        return self.call([self.python.with_name("vtr"), *command.split()], codes, sentence)


def build(folder: Path, python: str) -> list[Path]:
    """Build the wheel and the toy wheel, each from its source distribution, from the files in git's index.

    A build writes next to its source, so the files are copied first; two trials can then run in one checkout.
    """
    source = folder / "source"
    for old in (source, folder / "dist"):
        shutil.rmtree(old, ignore_errors=True)
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={source}/"], cwd=ROOT, check=True)
    subprocess.run([python, "-m", "venv", "--clear", folder / "build"], check=True)
    builder = folder / "build" / "bin" / "python"
    subprocess.run([builder, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "build"], check=True)
    for project in (source, source / "assets"):
        command = [builder, "-m", "build", "--outdir", folder / "dist", project]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [next((folder / "dist").glob(f"{name}-[0-9]*.whl")) for name in (MAIN, TOY)]


def contents(folder: Path, wheel: Path) -> list[str]:
    """A sentence for everything that is wrong with the files in the wheel and in its source distribution."""
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tops = {name.partition("/")[0] for name in held}
    failures = [f"the wheel lacks {name}" for name in listed if name.partition("/")[0] in tops and name not in held]
    failures += [f"the wheel has {name}, which is not in the repository" for name in held - set(listed)]
    source = next((folder / "dist").glob(f"{MAIN}-[0-9]*.tar.gz"))
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    if source.stat().st_size > SOURCE_BYTES or any(name.startswith("assets") for name in inside):
        failures.append(f"{source.name} carries assets: {source.stat().st_size:,} bytes")
    return failures


def try_core(trial: Trial, toy: str) -> None:
    """With the core alone, try `reduce` and the commands of CORE. Other commands must work or say what to install."""
    image = IMAGE.format(toy=toy)
    trial.call([trial.python, "-c", REDUCE, f"{toy}/tinyllava", image], (0,))
    for words in CORE:
        trial.vtr(words, (0,))
    for name in ("eval", "compare", "report", "gallery", "demo", "serve-client", "tables paper", "bench latency"):
        trial.vtr(f"{name} {CALLS[name][0][0].format(toy=toy, taken=1)}", (0, 2), sentence=True)


def try_extras(trial: Trial, toy: str) -> None:
    """Try every command, in an order in which results exist before other commands read them."""
    # The demo must find its port taken, because on a free one it would serve for ever.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, calls in CALLS.items():
            for arguments, code in calls:
                trial.vtr(f"{name} {arguments.format(toy=toy, taken=port)}", (code,))


def main() -> int:
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    if CALLS.keys() != INSTALLED:
        print(f"CALLS does not fit the commands: {CALLS.keys() ^ INSTALLED}")
        return 1
    folder, python = Path(sys.argv[1]).resolve(), (sys.argv[2:] or ["python3"])[0]
    folder.mkdir(parents=True, exist_ok=True)
    wheel, toy_wheel = build(folder, python)
    trial = Trial(folder, python)
    trial.failures += contents(folder, wheel)
    trial.install(str(wheel), str(toy_wheel))
    toy = trial.call([trial.python, "-c", f"import {TOY}; print({TOY}.__path__[0])"], (0,)).strip()
    try_core(trial, toy)
    trial.install(f"{wheel}[{EXTRAS}]")
    try_extras(trial, toy)
    print(*trial.failures, f"{len(trial.failures)} failures; {folder / 'log'} has all output.", sep="\n")
    return 1 if trial.failures else 0


if __name__ == "__main__":
    sys.exit(main())
