"""All scores of the three papers on one image, what they are worth against the true places, and their storage.

The files of the toy GQA hold no masks. An image is a function of its name, so it is drawn again, compared with the
stored file byte for byte, and the patches of its things are taken from the new drawing.

A method that keeps every token notes what it could rank by; it goes through the ordinary pipeline, so a noted score is
what the method of that name would receive. Every measure of every score is stored image by image, so that an
interrupted command goes on where it stopped.

Shapes of measures: S scores (any number of leading axes), N patches in raster order. All values are float64.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import entropy, rankdata
from torch import Tensor
from tqdm import tqdm

from attnmix.method import text_scores
from consensusdrop.method import pool_attention
from eval import benchmarks
from eval.answers.jsonl import read_bytes, read_json
from eval.answers.source_hash import answer_sources, check_sources, combined
from eval.config import DEFAULT_DATA
from lab.toy.data.questions import SINGULAR, offset
from lab.toy.data.scenes import Thing, scene
from lab.toy.data.vocabulary import COLOR_NAMES, PATTERNS, SHAPES, SIZES
from llava.errors import UserError, optional_imports
from llava.model.llava_arch import Llava
from llava.pipeline.generate import prefill
from llava.processing.prompt import Sample
from llava.reduction import DecoderState, PromptState, Reducer, Reduction, TowerScore
from visiondrop.method import attention_inputs, visual_scores

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Images and questions.

PATCHES, HALF = 576, 288  # 24 along each side
WORDS = (*COLOR_NAMES, *SHAPES)  # the content words whose things are known


@dataclass(frozen=True)
class Scene:
    """An image and its things.

    Attributes:
        name: without ".jpg"; ends in "n" for a natural and "d" for a dense scene.
        things: what was painted, in the order in which `owner` numbers it.
        owner: [576] int8 in raster order, the thing that covers a patch, -1 for background.
    """

    name: str
    things: tuple[Thing, ...]
    owner: NDArray[np.int8]

    def patches(self, numbers: Iterable[int]) -> Mask:
        """[576] bool, the patches of the things with these numbers."""
        return np.isin(self.owner, list(numbers))


@dataclass(frozen=True)
class AnnotatedQuestion:
    """A question with what it speaks of.

    Attributes:
        family: one of the nine of lab/toy/data/questions.py.
        targets: numbers of the things that it names, () where the image has none of them.
    """

    id: str
    family: str
    text: str
    answer: str
    image: str
    targets: tuple[int, ...]


@cache
def redraw(name: str, data: Path = DEFAULT_DATA) -> Scene:
    """The image of a name such as "test00012d", drawn again.

    Raises:
        UserError: scikit-learn is missing, or the drawing differs from the stored file, whose masks would then be
            wrong.
    """
    stored = read_bytes(data / "gqa" / "data" / "images" / f"{name}.jpg")
    with optional_imports("sklearn"):
        drawn = scene(name[:-6], int(name[-6:-1]), name.endswith("d"))
    if drawn.jpeg != stored:
        raise UserError(
            f"{name}.jpg is not what lab/toy/data/scenes.py draws here, so the masks of its objects are unknown; "
            "restore the file, or use the versions of numpy and pillow in requirements.txt."
        )
    return Scene(name, drawn.things, drawn.owner.reshape(-1))


def words_of(thing: Thing) -> set[str]:
    """All that a noun phrase may say of a thing: "object", "star", "small", "red"; "frame", "green"; "striped"."""
    named = ((thing.shape, SHAPES), (thing.color, COLOR_NAMES), (thing.big, SIZES), (thing.pattern, PATTERNS))
    kind = "object" if thing.kind == "shape" else thing.kind
    return {kind, *(names[number] for number, names in named if number >= 0)}


def matching(things: Sequence[Thing], phrase: str) -> tuple[int, ...]:
    """Numbers of the things that a noun phrase of the questions fits: "small red star", "blue objects"."""
    wanted = {SINGULAR.get(word, word) for word in phrase.split()}
    return tuple(number for number, thing in enumerate(things) if wanted <= words_of(thing))


def targets_of(things: Sequence[Thing], family: str, program: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Numbers of the things that a question is about, from the program in GQA's annotation.

    The one that is asked for and the one that it is related to; all that fit where the question counts them.
    """
    first = matching(things, program[0]["argument"])
    if family not in ("relate", "verify", "choose"):
        return first
    name, relation = program[1]["argument"].rsplit(",", 1)
    second = matching(things, name)
    if family == "relate":  # several things have this name; one stands on that side
        second = tuple(n for n in second if n not in first and offset(things[n], things[first[0]], relation) > 0)
    return tuple(sorted({*first, *second}))


@cache
def questions(split: str = "testdev", data: Path = DEFAULT_DATA) -> tuple[AnnotatedQuestion, ...]:
    """All questions of a split in the order of the benchmark, with the things that they name."""
    records = read_json(data / "gqa" / "data" / f"{split}_balanced_questions.json")
    asked = []
    for identity, record in records.items():
        family, image = record["types"]["detailed"], redraw(record["imageId"], data)
        targets = targets_of(image.things, family, record["semantic"])
        asked.append(AnnotatedQuestion(identity, family, record["question"], record["answer"], image.name, targets))
    return tuple(asked)


def word_mask(image: Scene, word: str) -> Mask:
    """[576] bool, patches of the things that a colour or a shape word is true of; a frame has its colour."""
    return image.patches(n for n, thing in enumerate(image.things) if word in words_of(thing))


def content_words(text: str) -> list[bool]:
    """For each token of a question, whether it names a thing or an attribute of one ("red", "circles", "frame")."""
    known = {*WORDS, *SINGULAR, *PATTERNS, *SIZES, "frame", "panel"}
    return [word in known for word in text.lower().replace("?", " ?").split()]


# Measures of scores.


def auroc(scores: Array, mask: Mask, among: Mask | None = None) -> Array:
    """[...] chance that a patch of the mask scores above another patch; equal scores count one half.

    Args:
        scores: [..., N].
        mask: [N], some patches in it and some not.
        among: [N], patches that count; None for all.
    """
    if among is not None:
        scores, mask = scores[..., among], mask[among]
    inside, outside = int(mask.sum()), int((~mask).sum())
    ranks = rankdata(scores, axis=-1)
    area: Array = (ranks[..., mask].sum(-1) - inside * (inside + 1) / 2) / (inside * outside)
    return area


def chosen(scores: Array, count: int) -> Mask:
    """[..., N] bool, the `count` highest, equal scores by the lower index as everywhere in the repository."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    highest = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(highest, order[..., :count], True, axis=-1)
    return highest


def recall(scores: Array, mask: Mask, count: int) -> Array:
    """[...] share of the patches of the mask that are among the `count` highest scores."""
    found: Array = chosen(scores, count)[..., mask].mean(-1)
    return found


def share(scores: Array) -> Array:
    """[..., N] scores of at least 0, scaled to sum 1."""
    scaled: Array = scores / scores.sum(-1, keepdims=True)
    return scaled


def effective_share(scores: Array) -> Array:
    """[...] exp(entropy) / N of the score as a distribution: 1 if uniform, 1 / N if on one patch."""
    part: Array = np.exp(entropy(scores, axis=-1)) / scores.shape[-1]
    return part


def overlap(a: Array, b: Array, count: int) -> Array:
    """[...] share of the `count` highest of a that are among the `count` highest of b; by chance count / N."""
    common: Array = (chosen(a, count) & chosen(b, count)).sum(-1) / count
    return common


def mean_pairwise(scores: Array) -> float:
    """Mean rank correlation over all pairs of the Q rows of [Q, N]; 1 if all rows rank alike. Needs two rows."""
    correlation = np.corrcoef(rankdata(scores, axis=-1))
    return float(correlation[np.triu_indices(len(scores), 1)].mean())


# Scores.

ENCODER, COSINE, PROBE = "encoder", "cosine", "probe"
# Scores of each decoder layer. "last": row of the last prompt token; "question": mean over the question's rows;
# "content", "function": the same over the words that name things, and over the others; "visual": attention received
# from visual tokens (VisionDrop's); "viewers": the same divided by the number of tokens that can see the patch.
TEXT_KINDS = ("last", "question", "content", "function")
VISUAL_KINDS = ("visual", "viewers")
ROWS = ("question", "last")  # whose attention is noted


def score_names(layers: int) -> tuple[str, ...]:
    """Names of all scores of a model with so many decoder layers, such as "last 3"."""
    text = [f"{kind} {layer}" for kind in TEXT_KINDS for layer in range(layers)]
    visual = [f"{kind} {layer}" for kind in VISUAL_KINDS for layer in range(1, layers)]
    return (ENCODER, COSINE, PROBE, *text, *visual)


@dataclass(frozen=True, kw_only=True)
class Observer(Reducer):
    """Notes scores and drops nothing. Not registered: it is no method.

    Attributes:
        reversed: the decoder reads the visual tokens in the opposite order. Their features stay what they were, so
            only their places in the sequence differ.
        notes: name -> [Q, 576] in raster order, for a batch of Q questions about one image; for text rows
            [Q, T, 576] under "rows LAYER", with their mask [Q, T] under "exists".
    """

    known_deviations: ClassVar[dict[str, str]] = {"unsorted": "the decoder reads backwards where `reversed` says so"}

    reversed: bool = False
    notes: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def keeps_all(self, tokens: int) -> bool:
        return False  # or the pipeline would skip the stage before the decoder

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return tuple(range(1, layers))

    def prompt(self, state: PromptState) -> Reduction | None:
        self.notes[ENCODER] = state.scores[self.scores()[0]]
        words, exists = state.text("question")
        self.notes[COSINE] = text_scores(words, exists, state.tokens, temperature=0.01)
        attention = state.text_attention(0, "question", rotary=False, contextual=False)
        self.notes[PROBE] = pool_attention(*attention, "mean", "mean")
        self.notes["tokens"], self.notes["exists"] = state.tokens[0], exists
        # Layer 0 sees embeddings; its attention with rotation, the softmax over visual keys alone.
        if not self.reversed:
            self._note_text(0, *(state.text_attention(0, rows, rotary=True, contextual=False)[0] for rows in ROWS))
            return None
        count = state.tokens.shape[1]
        backwards = torch.arange(count - 1, -1, -1, device=state.tokens.device)
        return Reduction(backwards.expand(len(state.tokens), -1), count)

    def decoder(self, state: DecoderState) -> Reduction | None:
        self._note_text(state.layer, *(state.attention(rows)[0] for rows in ROWS))
        # Visual tokens do not see the question, so one question of the image stands for all.
        first = replace(state, ids=state.ids[:1], tokens=state.tokens[:1], sequence=state.sequence.rows([(0, 0)]))
        seen = attention_inputs(first, "causal")
        for kind, average in zip(VISUAL_KINDS, ("all", "viewers"), strict=True):
            score = visual_scores(first, seen, "causal", average, diagonal=True)
            self.notes[f"{kind} {state.layer}"] = self._raster(score).expand(len(state.tokens), -1)
        return None

    def _note_text(self, layer: int, question: Tensor, last: Tensor) -> None:
        """Keep attention [Q, H, T, N] of the question's rows and of the last one as its mean over heads."""
        self.notes[f"rows {layer}"] = self._raster(question.mean(1))
        self.notes[f"last {layer}"] = self._raster(last.mean(1))[:, 0]

    def _raster(self, score: Tensor) -> Tensor:
        return score.flip(-1) if self.reversed else score


def observe(model: Llava, samples: Sequence[Sample], reverse: bool = False) -> dict[str, NDArray[np.float64]]:
    """All scores of the questions about one image.

    Args:
        samples: Q questions with the same image.
        reverse: feed the visual tokens to the decoder in the opposite order. Then the scores of layer 0 are left out.

    Returns:
        The names of `score_names` -> [Q, 576]; and "tokens": [576, D] projected visual tokens.
    """
    layers = len(model.llm.layers)
    observer = Observer(budget=model.visual_tokens, reversed=reverse)
    prefill(model, samples, observer)
    notes = {name: tensor.double().numpy() for name, tensor in observer.notes.items() if name != "exists"}
    exists = observer.notes["exists"].numpy()
    for layer in range(int(reverse), layers):
        rows = notes.pop(f"rows {layer}")
        for kind in TEXT_KINDS[1:]:
            notes[f"{kind} {layer}"] = np.stack(
                [
                    own[chosen_rows(sample.question, kind, there)].mean(0)
                    for own, sample, there in zip(rows, samples, exists, strict=True)
                ]
            )
    return notes


def chosen_rows(question: str, kind: str, exists: NDArray[Any]) -> Mask:
    """[T] bool: which of the question's rows a kind of score averages."""
    content = np.zeros(len(exists), dtype=bool)
    content[: exists.sum()] = content_words(question)
    return {"question": exists, "content": content, "function": exists & ~content}[kind]


# Numbers of images.

# Each image is seen as it is; with its upper and lower half exchanged; and with the decoder reading the visual
# tokens backwards. In the last two every content stands in the other half of the sequence.
CONDITIONS = ("as drawn", "halves exchanged", "read backwards")
# Of every question: how well a score finds the things that it names ("... of others": the same with the scores of the
# image's other questions, which name other things), NaN where there are none; where in the sequence a score lies; how
# broad it is, and how far it agrees with the encoder's saliency.
MEASURES = ("auroc", "auroc of others", "recall 64", "late", "late 64", "effective", "overlap 64")
# Of every word: how well its cosine finds the patches of the things it is true of, and, as a control, those of the
# words of the same class (colours or shapes) that nothing in the image is.
WORD = ("auroc", "among things", "absent word", "absent word among things", "other word")


@dataclass(frozen=True)
class Collected:
    """Numbers of a set of images under one condition. Q questions, S scores, P images, W words.

    Attributes:
        names: of the S scores.
        values: [Q, S, measures], NaN where a score or a target does not exist.
        asked: the Q questions.
        rows: [P, S, 24] share of a score in every row of patches of the image, mean over its questions.
        agreement: [P, S] mean rank correlation between the questions of an image.
        words: [P, W, 5] the measures of WORD.
    """

    names: tuple[str, ...]
    values: Array
    asked: tuple[AnnotatedQuestion, ...]
    rows: Array
    agreement: Array
    words: Array

    def of(self, score: str, measure: str) -> dict[str, float]:
        """Question id -> value, of the questions that have one."""
        column = self.values[:, self.names.index(score), MEASURES.index(measure)]
        return {one.id: float(x) for one, x in zip(self.asked, column, strict=True) if not np.isnan(x)}

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.image for one in self.asked))

    @property
    def image_of(self) -> dict[str, str]:
        """Question id -> image."""
        return {one.id: one.image for one in self.asked}


def collect(model: Llava, condition: str, images: Sequence[str], folder: Path) -> Collected:
    """Measure all scores of all questions about these images; what is in `folder` already is read from there."""
    data = benchmarks.get("gqa").load(DEFAULT_DATA, "testdev")
    by_id = {question.id: question for question in data.questions}
    asked = [one for name in images for one in questions() if one.image == name]
    observer = Observer(budget=model.visual_tokens)
    home = folder / f"scores-{digest(model, observer)}" / condition.replace(" ", "-")
    home.mkdir(parents=True, exist_ok=True)
    arrays_of: dict[str, list[Array]] = {}
    for name in tqdm(images, desc=condition, unit="image", file=sys.stderr):
        file = home / f"{name}.npz"
        if not file.is_file():
            own = [one for one in asked if one.image == name]
            samples = [data.sample(by_id[one.id]) for one in own]
            arrays = measure_image(model, samples, own, condition)
            check_sources(model, observer)
            part = file.with_suffix(".part.npz")
            np.savez(part, **arrays)  # type: ignore[arg-type]
            part.replace(file)
        with np.load(file, allow_pickle=False) as stored:
            for key in stored.files:
                arrays_of.setdefault(key, []).append(stored[key].astype(np.float64))
    whole = {key: np.concatenate(parts) if key == "values" else np.stack(parts) for key, parts in arrays_of.items()}
    return Collected(score_names(model.spec.layers), asked=tuple(asked), **whole)


def digest(model: Llava, reducer: Reducer) -> str:
    """Changes with the weights and with all code that the numbers depend on, this file's included."""
    parts = [model.fingerprint, combined(answer_sources(model, reducer))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def exchanged(image: Image.Image) -> Image.Image:
    """The image with its upper and lower half exchanged: every patch keeps its pixels."""
    pixels = np.asarray(image)
    return Image.fromarray(np.roll(pixels, len(pixels) // 2, axis=0))


def measure_image(
    model: Llava, samples: Sequence[Sample], asked: Sequence[AnnotatedQuestion], condition: str
) -> dict[str, Array]:
    """The arrays of `Collected` for one image.

    With halves exchanged all scores are moved back, so that index i is the same content in every condition; only the
    measures of lateness read where it stood.
    """
    image = redraw(asked[0].image)
    moved = condition == "halves exchanged"
    if moved:
        samples = [
            Sample(s.id, s.question, s.suffix, exchanged(s.images[0]), (f"{s.image_ids[0]} exchanged",))  # type: ignore[arg-type]
            for s in samples
        ]
    notes = observe(model, samples, reverse=condition == "read backwards")
    tokens = notes.pop("tokens")
    names = score_names(model.spec.layers)
    if moved:
        notes = {name: np.roll(score, HALF, axis=-1) for name, score in notes.items()}
        tokens = np.roll(tokens, HALF, axis=0)
    late = np.arange(PATCHES) >= HALF
    late = late if condition == "as drawn" else ~late
    known = [name for name in names if name in notes]
    scores = np.stack([notes[name] for name in known], axis=1)  # [Q, S, 576]
    values = np.full((len(asked), len(names), len(MEASURES)), np.nan)
    places = [names.index(name) for name in known]
    values[:, places] = measure(scores, notes[ENCODER], image, asked, late)
    rows, agreement = np.full((len(names), 24), np.nan), np.full(len(names), np.nan)
    rows[places] = share(scores).mean(0).reshape(len(known), 24, -1).sum(-1)
    if len(asked) > 1:
        agreement[places] = [mean_pairwise(scores[:, place]) for place in range(len(known))]
    return {
        "values": values.astype(np.float32),
        "rows": rows.astype(np.float32),
        "agreement": agreement.astype(np.float32),
        "words": measure_words(word_cosines(model, tokens), image).astype(np.float32),
    }


def measure(scores: Array, encoder: Array, image: Scene, asked: Sequence[AnnotatedQuestion], late: Mask) -> Array:
    """[Q, S, measures] of the scores [Q, S, 576] of the questions about one image.

    Args:
        encoder: [Q, 576], what agreement is measured with.
        late: [576] bool, the patches that stand in the second half of the sequence.
    """
    found = {
        "late": share(scores)[..., late].sum(-1),
        "late 64": chosen(scores, 64)[..., late].sum(-1) / 64,
        "effective": effective_share(scores),
        "overlap 64": overlap(scores, encoder[:, None], 64),
        **{name: np.full(scores.shape[:2], np.nan) for name in ("auroc", "auroc of others", "recall 64")},
    }
    for row, one in enumerate(asked):
        mask = image.patches(one.targets)
        if not mask.any():
            continue
        found["auroc"][row] = auroc(scores[row], mask)
        found["recall 64"][row] = recall(scores[row], mask, 64)
        # Only questions that share no thing count.
        other = [n for n, two in enumerate(asked) if two.targets and not set(two.targets) & set(one.targets)]
        if other:
            found["auroc of others"][row] = auroc(scores[other], mask).mean(0)
    return np.stack([found[name] for name in MEASURES], axis=-1)


def word_cosines(model: Llava, tokens: Array) -> Array:
    """[W, 576] cosine of the input embedding of each of WORDS with every projected visual token [576, D]."""
    ids = torch.tensor([model.tokenizer.convert_tokens_to_ids(word) for word in WORDS])
    with torch.inference_mode():
        table = model.hf_model.get_input_embeddings()(ids.to(model.device)).double().cpu().numpy()
    unit = [rows / np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (table, tokens)]
    cosines: Array = unit[0] @ unit[1].T
    return cosines


def measure_words(cosines: Array, image: Scene) -> Array:
    """[W, 5] the measures of WORD; NaN for a word that is true of no thing, or where a control does not exist."""
    table = np.full((len(WORDS), len(WORD)), np.nan)
    masks = np.stack([word_mask(image, word) for word in WORDS])
    things = image.owner >= 0
    for group in (range(len(COLOR_NAMES)), range(len(COLOR_NAMES), len(COLOR_NAMES) + len(SHAPES))):
        absent = [n for n in group if not masks[n].any()]
        for n in group:
            if not masks[n].any():
                continue
            others = things & ~masks[n]
            table[n, 0] = auroc(cosines[n], masks[n])
            if others.any():
                table[n, 1] = auroc(cosines[n], masks[n], things)
            if absent:
                table[n, 2] = auroc(cosines[absent], masks[n]).mean()
                if others.any():
                    table[n, 3] = auroc(cosines[absent], masks[n], things).mean()
            rest = [k for k in group if k != n and masks[k].any()]
            if rest:
                table[n, 4] = auroc(cosines[rest], masks[n]).mean()
    return table
