"""A LLaVA with a reduction method as lmms-eval's model.

Checked against lmms-eval 0.7.3. As in its own LLaVA models, the stop strings of a task ("until") are not used: an
answer ends with the end token or after max_new_tokens.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from PIL import Image
from tqdm import tqdm

from eval.benchmarks.llava_files import split_suffix
from eval.config import build_reducer
from eval.harnesses import conclude, ends_the_process, refuse_ranks
from eval.lmms_plugin import configuration
from eval.results.cost import accounting_record
from eval.run import load_model
from llava.budget import budget_text
from llava.errors import UserError
from llava.pipeline.generate import generate
from llava.processing.image import as_rgb
from llava.processing.prompt import Sample
from llava.processing.video import Video, read_video
from llava.reduction.budget import require

try:
    from lmms_eval.api.model import lmms
except ModuleNotFoundError as error:
    raise UserError(
        f"The plug-in needs lmms-eval, and {error.name} is not installed; see docs/harnesses.md, or run python -m eval."
    ) from error

# What lmms-eval's LLaVA takes where a task sets no limit.
LONGEST = 1024


class LlavaReduced(lmms):
    """One model under one method at one budget.

    Args:
        batch_size: questions answered at once; answers do not depend on it.
        arguments: see eval.lmms_plugin; `set.KEY` and `image.KEY` among them.
    """

    is_simple = True

    @ends_the_process
    def __init__(self, batch_size: int | str = 1, **arguments: Any) -> None:
        super().__init__()
        refuse_ranks("llava_reduced", "start lmms-eval without accelerate or torchrun")
        config = configuration({**arguments, "batch_size": batch_size})
        build_reducer(config, visual_tokens=None)  # wrong names are found before the weights are read
        self.config = config
        self.model = load_model(config)
        self.reducer = build_reducer(config, self.model.visual_tokens)
        require(self.reducer, self.model.spec)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def device(self) -> Any:
        return self.model.device

    @ends_the_process
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers in the order of the requests."""
        texts = [""] * len(requests)
        accounts: list[dict[str, Any]] = []
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            _, settings, _, _, task, _ = request.args
            by_length[max_new_tokens(settings, task)].append(place)
        budget = budget_text(self.reducer.budget, self.reducer.retention_ratio)
        with tqdm(total=len(requests), desc=f"{self.reducer.name} {budget}", unit="question") as bar:
            for length, places in by_length.items():
                for start in range(0, len(places), self.batch_size):
                    chunk = places[start : start + self.batch_size]
                    samples = [self.sample(requests[place]) for place in chunk]
                    batch = generate(self.model, samples, self.reducer, max_new_tokens=length)
                    for place, answer in zip(chunk, batch.answers, strict=True):
                        texts[place] = answer.text
                        self.cache_hook.add_partial("generate_until", requests[place].args[:2], answer.text)
                    accounts += [accounting_record(answer.accounting) for answer in batch.answers]
                    bar.update(len(chunk))
        if accounts:
            conclude(accounts, self.reducer)
        return texts

    def sample(self, request: Any) -> Sample:
        """A request as a question; its answer-format instruction, where it is a known one, is told apart."""
        context, _, visuals_of, number, task, split = request.args
        question, suffix = split_suffix(context)
        name = f"{task}/{split}/{number}"
        images = tuple(opened(visual, name) for visual in visuals_of(self.task_dict[task][split][number]) or ())
        return Sample(name, question, suffix, images[0] if len(images) == 1 else images or None)

    @ends_the_process
    def refuse(self, requests: Sequence[Any]) -> NoReturn:
        """For the requests that are not answered."""
        raise UserError(
            "llava_reduced generates one answer per question, no likelihoods and no dialogues; "
            "choose a task whose output_type is generate_until."
        )

    loglikelihood = generate_until_multi_round = refuse


def max_new_tokens(settings: Mapping[str, Any], task: str) -> int:
    """The task's limit; UserError if it wants anything but greedy decoding."""
    warm = (settings.get("temperature") or 0) > 0 and settings.get("do_sample") is not False
    if warm or (settings.get("num_beams") or 1) > 1:
        raise UserError(
            f"Task {task} asks for sampling or beams, and llava_reduced decodes greedily; "
            "add --gen_kwargs temperature=0,do_sample=False,num_beams=1."
        )
    return int(settings.get("max_new_tokens") or LONGEST)


def opened(visual: object, name: str) -> Image.Image | Video:
    """An image as RGB, or the frames of a video that is given as a path."""
    if isinstance(visual, Image.Image):
        return as_rgb(visual)
    if isinstance(visual, str | os.PathLike):
        return read_video(os.fspath(visual))
    raise UserError(f"{name} comes with a {type(visual).__name__}; llava_reduced takes images and paths of videos.")
