"""Hold a method against recordings of its official code on the random model of tests/parity/model.py.

A recording (tests/data/parity/<method>-<variant>.npz) names the method, budget and options that reproduce it, the
repository and commit that was run, and holds, for numbered cases, what that code kept and computed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.model.checkpoint.config import hf_key, hf_tower_key
from llava.model.llava_arch import Llava
from llava.model.multimodal_encoder.clip_text_encoder import ClipText
from llava.pipeline import decoder
from llava.pipeline.generate import prefill
from llava.processing.prompt import IMAGE_TOKEN_INDEX, Prompt, Sample
from llava.reduction import Step, registry
from tests.parity import model as recipe
from tests.watch import watched

FOLDER = Path(__file__).parent.parent / "data" / "parity"
CLS, EXTRA, NOTHING = -1, -2, -9  # values of `kept` that are no patch
STEP_TOKEN = 7  # id fed to the one decode step that was recorded


class ParityLlava(Llava):
    """The random model; its samples are case numbers, so that ids and pixels are exactly the recorded ones."""

    def prompt(self, sample: Sample) -> Prompt:
        case = recipe.case(int(sample.id))
        start = len(case.before) + 1
        span = (start, start + len(case.after))
        return Prompt((*case.before, IMAGE_TOKEN_INDEX, *case.after), span, span, "")

    @cached_property
    def clip(self) -> ClipText:
        config, words = CLIPTextConfig(**recipe.CLIP_TEXT_CONFIG), lambda text: [int(word) for word in text.split()]
        ends = config.bos_token_id, config.eos_token_id
        clip = ClipText(config, recipe.WIDTH, self.tower.post_layernorm, words, *ends)
        weights = {name: tensor for name, tensor in recipe.text_tower_weights().items() if name != "logit_scale"}
        clip.load_state_dict(weights)
        return clip.eval()


@contextmanager
def float64() -> Iterator[None]:
    """Every number of a block is float64, also where the code asks for float32.

    Near ties, which the last bits of float32 decide, are then no ties, so that two programs can be held against each
    other to the last token. Recordings that say `"dtype": "float64"` were made in the same way.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@cache
def parity_model(double: bool = False) -> ParityLlava:
    """The model in float32; with `double` in float64, to be built and used under `float64()`."""
    config = LlavaConfig(
        text_config={"model_type": "llama", **recipe.LANGUAGE_CONFIG},
        vision_config=recipe.VISION_CONFIG,
        image_token_index=recipe.WORDS,
    )
    config._attn_implementation = "sdpa"
    container = LlavaForConditionalGeneration(config).eval()
    weights = {hf_key(name): tensor for name, tensor in recipe.language_weights().items()}
    weights |= {hf_tower_key(name): tensor for name, tensor in recipe.vision_weights().items()}
    container.load_state_dict(weights)
    checkpoint = SimpleNamespace(
        model=container,
        tokenizer=None,
        image_processor=lambda pixels: pixels,
        conversation="vicuna_v1",
        name="parity",
        layout="original",
        notes=(),
        vocabulary=recipe.WORDS,
        spread=False,
        files={},
        text_tower="tests.parity.model.text_tower_weights",
    )
    return ParityLlava(checkpoint, torch.device("cpu"))


@dataclass
class Ours:
    """What our code did with one case."""

    steps: list[Step]
    tokens_per_layer: tuple[int, ...]
    tokens: dict[str, Tensor]
    logits: Tensor
    step: Tensor


@torch.inference_mode()
def run_case(model: ParityLlava, reducer, number: int) -> Ours:
    clip = " ".join(map(str, recipe.case(number).clip[1:-1]))  # framed by the text tower itself
    pixels = recipe.case(number).pixels.to(torch.get_default_dtype())
    sample = Sample(str(number), clip, image=pixels)
    with watched() as seen:
        state, record = prefill(model, [sample], reducer)
    tokens = {}
    for stage, sequence in seen.sequences.items():
        name = f"tokens_{stage.removeprefix('layer ')}" if stage.startswith("layer") else "tokens"
        tokens[name] = sequence.take(sequence.hidden, sequence.images)[0]
    entering = record.accounting(state)[0].tokens_per_layer
    logits = model.logits(state.hidden)[0]
    hidden = decoder.step(model.llm, state, model.llm.embed_tokens(torch.tensor([[STEP_TOKEN]])))
    return Ours(record.steps[0], entering, tokens, logits, model.logits(hidden)[0])


@dataclass(frozen=True)
class Agreement:
    """How far a method and a recording agree.

    Attributes:
        cases: compared.
        stable: cases whose choice does not hang on the last bits: the recorder repeated the official computation
            with a relative noise of 1e-6 after every block and got the same tokens. Only these must agree.
        kept: cases in which every stage keeps the very same tokens in the same order.
        kept_stable: those among the stable ones.
        overlap: share of the recorded tokens that ours keeps too, all stages together.
        apart: the most recorded tokens that ours lacks in a case, stable or not, at the first stage that differs: later
            stages rank other hidden states.
        tokens_per_layer: cases with the same number of tokens entering every layer.
        tokens, logits, step: largest difference of merged tokens, prefill logits and logits after one decode step,
            over the stable cases whose kept tokens are the same; None where nothing was recorded.
    """

    cases: int
    stable: int
    kept: int
    kept_stable: int
    overlap: float
    apart: int
    tokens_per_layer: int
    tokens: float | None
    logits: float | None
    step: float | None


def recordings() -> list[Path]:
    """Recordings of whole runs; the others (a selection on drawn inputs) belong to the method's own test."""
    return [path for path in sorted(FOLDER.glob("*.npz")) if "entering" in recording(path)[1]]


def recording(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Meta data and arrays of one recording."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "meta"}
        return json.loads(str(file["meta"])), arrays


def check(path: Path, cases: slice = slice(None)) -> Agreement:
    """Run these of the recorded cases and compare."""
    meta, arrays = recording(path)
    double = meta.get("dtype") == "float64"
    rows = range(len(arrays["cases"]))[cases]
    with float64() if double else nullcontext():
        model = parity_model(double)
        reducer = registry.build(meta["method"], meta["budget"], meta["options"])
        reducer.check(model.spec)
        results = [run_case(model, reducer, int(arrays["cases"][row])) for row in rows]
    stable = arrays.get("stable", np.ones(len(arrays["cases"]), dtype=int)).astype(bool)
    same, same_stable, entering, shared, total, apart = 0, 0, 0, 0, 0, 0
    worst: dict[str, float] = {}
    for row, ours in zip(rows, results, strict=True):
        entering += list(ours.tokens_per_layer) == arrays["entering"][row].tolist()
        stages = [compare_kept(ours, name, arrays[name][row]) for name in arrays if name.split("_")[0] == "kept"]
        shared += sum(found for found, _, _ in stages)
        total += sum(count for _, count, _ in stages)
        if not all(exact for _, _, exact in stages):
            apart = max(apart, next(count - found for found, count, exact in stages if not exact))
            continue
        same += 1
        same_stable += int(stable[row])
        if not stable[row]:
            continue
        for name, values in compared(ours, arrays, row):
            worst[name] = max(worst.get(name, 0.0), values)
    worst_of = (worst.get(name) for name in ("tokens", "logits", "step"))
    overlap = shared / max(total, 1)
    return Agreement(
        len(rows), int(stable[rows.start : rows.stop].sum()), same, same_stable, overlap, apart, entering, *worst_of
    )


def compare_kept(ours: Ours, name: str, theirs: np.ndarray) -> tuple[int, int, bool]:
    """(tokens that both keep, tokens recorded, whether order and all are equal) at one stage."""
    theirs = theirs[theirs != NOTHING]
    places = kept_places(ours, name)
    known = theirs != EXTRA
    exact = len(places) == len(theirs) and bool((places[known] == theirs[known]).all())
    return len(set(places.tolist()) & set(theirs[known].tolist())), int(known.sum()), exact


def kept_places(ours: Ours, name: str) -> np.ndarray:
    """[K] our anchors at a stage, numbered as in the recordings."""
    if name == "kept":
        steps = [step for step in ours.steps if not step.place.startswith("layer")]
        if not steps:
            return np.arange(recipe.PATCHES)
        place = torch.arange(steps[0].reduction.inputs) - int(steps[0].reduction.inputs == recipe.PATCHES + 1)
        for step in steps:
            place = place[step.reduction.kept[0]]
        return place.numpy()
    layer = name.removeprefix("kept_")
    found = [step.reduction.kept[0].numpy() for step in ours.steps if step.place == f"layer {layer}"]
    return found[0] if found else np.zeros(0, dtype=int)


def compared(ours: Ours, arrays: dict[str, np.ndarray], row: int):
    """(kind, largest difference) of everything that was recorded for this row."""
    for name, values in ours.tokens.items():
        if name in arrays and row < len(arrays[name]):
            theirs = torch.from_numpy(arrays[name][row][: len(values)])
            yield "tokens", float((values - theirs).abs().max())
    for name, values in (("logits", ours.logits), ("step", ours.step)):
        if name in arrays and row < len(arrays[name]):
            theirs = torch.from_numpy(arrays[name][row])
            yield name, float((values[: len(theirs)] - theirs).abs().max())
