"""Every script of scripts/train from nothing to a checkpoint that answers, with a few steps on a few scenes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.config import ROOT
from llava.model.builder import load
from llava.pipeline.generate import generate
from llava.processing.sample import Sample
from llava.processing.video import read_video
from llava.reduction import registry
from toy.stages import STAGES
from toy.stages.base import options
from toy.train import read_arguments

SCRIPTS = {
    "tiny": ("tinyllava", ("vision", "language")),
    "tiny_next": ("tinyllava_next", ("next",)),
    "tiny_video": ("tinyllava_video", ("video",)),
    "tiny_instruct": ("tinyllava_instruct", ("instruct",)),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of scripts/setup.sh: this interpreter's environment, marked as complete."""
    venv, wanted = tmp_path_factory.mktemp("venv"), hashlib.sha256((ROOT / "requirements.txt").read_bytes())
    for path in Path(sys.prefix).iterdir():
        if path.name != "requirements.sha256":
            (venv / path.name).symlink_to(path)
    (venv / "requirements.sha256").write_text(wanted.hexdigest() + "\n")
    return {**os.environ, "VENV": str(venv), "WANDB_MODE": "disabled"}


def test_every_script_is_run():
    found = {path.stem for path in (ROOT / "scripts" / "train").glob("tiny*.sh")}
    assert found == set(SCRIPTS) and {stage for _, stages in SCRIPTS.values() for stage in stages} == set(STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_from_nothing_to_a_checkpoint_that_answers(name, environment, tmp_path):
    """About a minute each on two free cores; `--quick` leaves the shipped assets alone."""
    shipped = ROOT / "assets" / SCRIPTS[name][0] / "model.safetensors"
    before = shipped.stat().st_mtime_ns
    script = ROOT / "scripts" / "train" / f"{name}.sh"
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "run"), "--quick"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| family | questions |" in done.stdout  # the report
    folder, stages = SCRIPTS[name]
    assert all((tmp_path / "run" / f"{stage}.pt").exists() for stage in stages)
    assert shipped.stat().st_mtime_ns == before
    model = load(str(tmp_path / "run" / "assets" / folder), device="cpu")
    image = Image.fromarray(np.zeros((192, 192, 3), np.uint8))
    if name == "tiny_video":
        image = read_video(next((ROOT / "assets" / "eval_video" / "video_qa" / "videos").glob("*.mp4")))
    sample = Sample("q", "What color is the star?", "Answer the question using a single word or phrase.", image)
    (answer,) = generate(model, [sample], registry.build("full", model.visual_tokens), max_new_tokens=4).answers
    assert isinstance(answer.text, str)


def test_a_script_refuses_an_unknown_flag(environment, tmp_path):
    script = str(ROOT / "scripts" / "train" / "tiny.sh")
    done = subprocess.run(["bash", script, "--fast"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "--fast" in done.stderr


def test_stages_have_flags_for_the_settings_they_use(tmp_path):
    args = read_arguments(["video", "--folder", str(tmp_path), "--videos", "7", "--keep-later", "90"])
    assert args.images == 7 and args.keep_later == 90 and args.steps is None
    with pytest.raises(SystemExit):
        read_arguments(["vision", "--folder", str(tmp_path), "--keep-later", "90"])
    assert all({"steps", "images", "batch"} <= {o.name for o in options(stage.defaults)} for stage in STAGES.values())
