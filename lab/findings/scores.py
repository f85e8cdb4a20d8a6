"""Compute all scores of the three papers for an image, measure how well they find true places, and store the results.

The files of the toy GQA hold no masks. An image is a function of its name, so it is drawn again and compared with the
stored file byte for byte; the patches of its things are taken from the new drawing.

A method that keeps every token notes all scores it could rank by. It runs in the ordinary pipeline, so each noted score
is what the method of that name would receive. Every measure of every score is stored image by image, so that an
interrupted command can continue.

In shapes, N is the number of patches in raster order, and "..." stands for any leading axes. All values are float64.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

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
from llava.pipeline.prefill import prefill
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
    """An image and the things in it.

    Attributes:
        name: file name without ".jpg"; it ends in "n" for a natural and "d" for a dense scene.
        things: what was painted; `owner` uses their indices.
        owner: [576] int8 in raster order, the index of the thing that covers a patch, -1 for background.
    """

    name: str
    things: tuple[Thing, ...]
    owner: NDArray[np.int8]

    def patches(self, numbers: Iterable[int]) -> Mask:
        """[576] bool, the patches of the things with these numbers."""
        return np.isin(self.owner, list(numbers))


@dataclass(frozen=True)
class AnnotatedQuestion:
    """A question with the things that it names.

    Attributes:
        family: one of the nine of lab/toy/data/questions.py.
        targets: indices of the things that it names; () if the image has none of them.
    """

    id: str
    family: str
    text: str
    answer: str
    image: str
    targets: tuple[int, ...]


@cache
def redraw(name: str, data: Path = DEFAULT_DATA) -> Scene:
    """Draw the image of a name such as "test00012d" again.

    Raises:
        UserError: scikit-learn is missing, or the drawing differs from the stored file, so its masks would be wrong.
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
    """All words that a noun phrase may use for a thing: "object", "star", "small", "red"; "frame", "green"."""
    named = ((thing.shape, SHAPES), (thing.color, COLOR_NAMES), (thing.big, SIZES), (thing.pattern, PATTERNS))
    kind = "object" if thing.kind == "shape" else thing.kind
    return {kind, *(names[number] for number, names in named if number >= 0)}


def matching(things: Sequence[Thing], phrase: str) -> tuple[int, ...]:
    """Indices of the things that a noun phrase of the questions fits: "small red star", "blue objects"."""
    wanted = {SINGULAR.get(word, word) for word in phrase.split()}
    return tuple(number for number, thing in enumerate(things) if wanted <= words_of(thing))


def targets_of(things: Sequence[Thing], family: str, program: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Indices of the things that a question is about, from the program in GQA's annotation.

    These are the thing that is asked for and the one that it is related to. If the question counts things, all that fit
    are included.
    """
    first = matching(things, program[0]["argument"])
    if family not in ("relate", "verify", "choose"):
        return first
    name, relation = program[1]["argument"].rsplit(",", 1)
    second = matching(things, name)
    if family == "relate":  # several things may have this name; only those on that side of the first count
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
    """[576] bool, patches of the things that a colour or shape word describes. A frame has a colour."""
    return image.patches(n for n, thing in enumerate(image.things) if word in words_of(thing))


def content_words(text: str) -> list[bool]:
    """For each token of a question, whether it names a thing or an attribute of one ("red", "circles", "frame")."""
    known = {*WORDS, *SINGULAR, *PATTERNS, *SIZES, "frame", "panel"}
    return [word in known for word in text.lower().replace("?", " ?").split()]


# Measures of scores.


def auroc(scores: Array, mask: Mask, among: Mask | None = None) -> Array:
    """[...] probability that a patch in the mask scores above one outside it; equal scores count one half.

    Args:
        scores: [..., N].
        mask: [N], neither empty nor full.
        among: [N], the patches that count; None for all.
    """
    if among is not None:
        scores, mask = scores[..., among], mask[among]
    inside, outside = int(mask.sum()), int((~mask).sum())
    ranks = rankdata(scores, axis=-1)
    area: Array = (ranks[..., mask].sum(-1) - inside * (inside + 1) / 2) / (inside * outside)
    return area


def chosen(scores: Array, count: int) -> Mask:
    """[..., N] bool, the `count` highest scores. Among equal scores the lower index wins, as in all methods."""
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
    """[...] share of the `count` highest of a that are also among the `count` highest of b; count / N by chance."""
    common: Array = (chosen(a, count) & chosen(b, count)).sum(-1) / count
    return common


def mean_pairwise(scores: Array) -> float:
    """Mean rank correlation over all pairs of the Q rows of [Q, N], with Q at least 2; 1 if all rows rank alike."""
    correlation = np.corrcoef(rankdata(scores, axis=-1))
    return float(correlation[np.triu_indices(len(scores), 1)].mean())


# Scores.

ENCODER, COSINE, PROBE = "encoder", "cosine", "probe"
# Scores of each decoder layer. "last": attention of the last prompt token; "question": mean attention of the question's
# tokens; "content", "function": the same for its words that name things, and for its other words; "visual": attention
# received from visual tokens (VisionDrop's); "viewers": the same divided by the number of tokens that see the patch.
TEXT_KINDS = ("last", "question", "content", "function")
VISUAL_KINDS = ("visual", "viewers")
ROWS = ("question", "last")  # tokens whose attention is noted


def score_names(layers: int) -> tuple[str, ...]:
    """Names of all scores of a model with this many decoder layers, such as "last 3"."""
    text = [f"{kind} {layer}" for kind in TEXT_KINDS for layer in range(layers)]
    visual = [f"{kind} {layer}" for kind in VISUAL_KINDS for layer in range(1, layers)]
    return (ENCODER, COSINE, PROBE, *text, *visual)


@dataclass(frozen=True, kw_only=True)
class Observer(Reducer):
    """Notes scores and drops nothing. It is not a method and not in the registry.

    Attributes:
        reversed: the decoder reads the visual tokens in the opposite order. Their features do not change, only their
            places in the sequence.
        notes: name -> [Q, 576] in raster order, for a batch of Q questions about one image. "rows LAYER" has the
            attention of the question's tokens, [Q, T, 576], and "exists" their mask [Q, T].
    """

    known_deviations: ClassVar[dict[str, str]] = {"unsorted": "the decoder reads backwards where `reversed` says so"}

    reversed: bool = False
    notes: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def scores(self) -> tuple[TowerScore, ...]:
        return (TowerScore("cls_attention"),)

    def keeps_all(self, tokens: int) -> bool:
        return False  # otherwise the pipeline would skip the stage before the decoder

    def decoder_layers(self, layers: int) -> tuple[int, ...]:
        return tuple(range(1, layers))

    def prompt(self, state: PromptState) -> Reduction | None:
        self.notes[ENCODER] = state.scores[self.scores()[0]]
        words, exists = state.text("question")
        self.notes[COSINE] = text_scores(words, exists, state.tokens, temperature=0.01)
        attention = state.text_attention(0, "question", rotary=False, contextual=False)
        self.notes[PROBE] = pool_attention(*attention, "mean", "mean")
        self.notes["tokens"], self.notes["exists"] = state.tokens[0], exists
        # The attention of layer 0, whose inputs are the embeddings: with rotation, softmax over visual keys only.
        if not self.reversed:
            self._note_text(0, *(state.text_attention(0, rows, rotary=True, contextual=False)[0] for rows in ROWS))
            return None
        count = state.tokens.shape[1]
        backwards = torch.arange(count - 1, -1, -1, device=state.tokens.device)
        return Reduction(backwards.expand(len(state.tokens), -1), count)

    def decoder(self, state: DecoderState) -> Reduction | None:
        self._note_text(state.layer, *(state.attention(rows)[0] for rows in ROWS))
        # Visual tokens do not see the question, so the first question stands for all.
        first = replace(state, ids=state.ids[:1], tokens=state.tokens[:1], sequence=state.sequence.rows([(0, 0)]))
        seen = attention_inputs(first, "causal")
        for kind, average in zip(VISUAL_KINDS, ("all", "viewers"), strict=True):
            score = visual_scores(first, seen, "causal", average, diagonal=True)
            self.notes[f"{kind} {state.layer}"] = self._raster(score).expand(len(state.tokens), -1)
        return None

    def _note_text(self, layer: int, question: Tensor, last: Tensor) -> None:
        """Keep the mean over heads of two attentions [Q, H, T, N]: of the question's tokens, and of the last token."""
        self.notes[f"rows {layer}"] = self._raster(question.mean(1))
        self.notes[f"last {layer}"] = self._raster(last.mean(1))[:, 0]

    def _raster(self, score: Tensor) -> Tensor:
        """[..., N] brought from reading order to raster order."""
        return score.flip(-1) if self.reversed else score


def observe(model: Llava, samples: Sequence[Sample], reverse: bool = False) -> dict[str, NDArray[np.float64]]:
    """All scores of the questions about one image.

    Args:
        samples: Q questions with the same image.
        reverse: feed the visual tokens to the decoder in the opposite order. The scores of layer 0 are then left out.

    Returns:
        Names as in `score_names` -> [Q, 576]; and "tokens" -> [576, D], the projected visual tokens.
    """
    layers = len(model.llm.layers)
    observer = Observer(budget=model.visual_tokens, reversed=reverse)
    prefill(model, samples, observer)
    notes = {name: tensor.double().numpy() for name, tensor in observer.notes.items() if name != "exists"}
    exists = observer.notes["exists"].numpy()
    content = np.zeros(exists.shape, dtype=bool)  # [Q, T], tokens of words that name things
    for sample, there, row in zip(samples, exists, content, strict=True):
        row[: there.sum()] = content_words(sample.question)
    averaged = {"question": exists, "content": content, "function": exists & ~content}
    for layer in range(int(reverse), layers):
        rows = notes.pop(f"rows {layer}")
        for kind, chosen_rows in averaged.items():
            means = [own[chosen].mean(0) for own, chosen in zip(rows, chosen_rows, strict=True)]
            notes[f"{kind} {layer}"] = np.stack(means)
    return notes


# Numbers of images.

# Each image is measured as it is, with its upper and lower half exchanged, and with the decoder reading the visual
# tokens backwards. In the last two every content stands in the other half of the sequence.
CONDITIONS = ("as drawn", "halves exchanged", "read backwards")
# Measures of a score for each question. "auroc", "recall 64": how well the score finds the things that the question
# names, NaN if there are none; "auroc of others": how well the scores of the image's questions about other things find
# them; "late", "late 64": how much of the score, and how many of its 64 highest values, lie in the second half of the
# sequence; "effective": how broad the score is; "overlap 64": how far it agrees with the encoder's saliency.
MEASURES = ("auroc", "auroc of others", "recall 64", "late", "late 64", "effective", "overlap 64")
# Measures of each word's cosine. "auroc", "among things": how well it finds the patches of the things that the word
# describes, among all patches and among those of things. As controls, how well the cosines of other words of its class
# (colours or shapes) find the same patches: of words that describe nothing in the image, and of words that do.
WORD = ("auroc", "among things", "absent word", "absent word among things", "other word")


@dataclass(frozen=True)
class Collected:
    """Measures for a set of images under one condition. Q questions, S scores, P images, W words.

    Attributes:
        names: names of the S scores.
        values: [Q, S, measures], NaN if a score or a target does not exist.
        asked: the Q questions.
        rows: [P, S, 24] share of a score in every row of patches of the image, mean over its questions.
        agreement: [P, S] mean rank correlation of a score between the questions of an image.
        words: [P, W, 5] the measures of WORD.
    """

    names: tuple[str, ...]
    values: Array
    asked: tuple[AnnotatedQuestion, ...]
    rows: Array
    agreement: Array
    words: Array

    def of(self, score: str, measure: str) -> dict[str, float]:
        """Question id -> value, for the questions that have one."""
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
    """Measure all scores of all questions about these images, except those already stored in `folder`."""
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
    """A hash of the weights and of all code that the numbers depend on."""
    parts = [model.fingerprint, combined(answer_sources(model, reducer))]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def exchanged(image: Image.Image) -> Image.Image:
    """The image with its upper and lower half exchanged. Every patch keeps its pixels."""
    pixels = np.asarray(image)
    return Image.fromarray(np.roll(pixels, len(pixels) // 2, axis=0))


def measure_image(
    model: Llava, samples: Sequence[Sample], asked: Sequence[AnnotatedQuestion], condition: str
) -> dict[str, Array]:
    """The arrays of `Collected` for one image.

    With halves exchanged all scores are moved back, so that an index is the same content in every condition. Only the
    measures of lateness use the place where it stood.
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
        encoder: [Q, 576] saliency of the encoder, with which agreement is measured.
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
        # Only questions without a thing in common count.
        other = [n for n, two in enumerate(asked) if two.targets and not set(two.targets) & set(one.targets)]
        if other:
            found["auroc of others"][row] = auroc(scores[other], mask).mean(0)
    return np.stack([found[name] for name in MEASURES], axis=-1)


def word_cosines(model: Llava, tokens: Array) -> Array:
    """[W, 576] cosine of the input embedding of each of WORDS with every projected visual token.

    Args:
        tokens: [576, D].
    """
    ids = torch.tensor([model.tokenizer.convert_tokens_to_ids(word) for word in WORDS])
    with torch.inference_mode():
        table = model.hf_model.get_input_embeddings()(ids.to(model.device)).double().cpu().numpy()
    unit = [rows / np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (table, tokens)]
    cosines: Array = unit[0] @ unit[1].T
    return cosines


def measure_words(cosines: Array, image: Scene) -> Array:
    """[W, 5] the measures of WORD; NaN for a word that describes no thing, or if a control does not exist."""
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
