"""Every measure of every score, picture by picture, stored so that an interrupted command goes on where it stopped."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import rankdata
from tqdm import tqdm

from eval import benchmarks
from eval.answers.source_hash import answer_sources, combined, read_source
from eval.config import DEFAULT_DATA, ROOT
from eval.findings import measures, scenes
from eval.findings.observe import ENCODER, TEXT_KINDS, Observer, observe, score_names
from eval.findings.scenes import PATCHES, WORDS, Asked, Picture
from llava.model.llava_arch import Llava
from llava.processing.sample import Sample
from toy.data.vocabulary import COLOR_NAMES, SHAPES

Array = NDArray[np.float64]
HALF = PATCHES // 2
ASKED = ("values", "kinds")  # arrays with a row per question; the others have one per picture

# Each picture is seen as it is; with its upper and lower half exchanged; and with the decoder reading the visual
# tokens backwards. In the last two every content stands in the other half of the sequence.
CONDITIONS = ("as drawn", "halves exchanged", "read backwards")
# Of every question: how well a score finds the things that it names, NaN where there are none.
# "among things": AUROC without the background. "... of others": the same with the scores of the picture's other
# questions, which name other things.
TARGET = (
    "auroc",
    "among things",
    "auroc of others",
    "recall 32 of others",
    "recall 64 of others",
    "average precision",
    "chance precision",
    "lift",
    "recall 32",
    "recall 64",
    "size",
    "place",
)
# Of every question: how much of the attention is on the image at all, where in the sequence a score lies, how broad it
# is, and how far it agrees with the encoder's saliency.
SHAPE = ("mass", "late", "late 64", "effective", "gini", "spearman", "overlap 32", "overlap 64", "overlap 128")
MEASURES = (*TARGET, *SHAPE)
OTHERS = slice(MEASURES.index("auroc of others"), MEASURES.index("recall 64 of others") + 1)
# Of every word: how well its cosine finds the patches of the things it is true of, and, as a control, those of the
# words of the same class (colours or shapes) that nothing in the picture is.
WORD = ("auroc", "among things", "absent word", "absent word among things", "other word")


@dataclass(frozen=True)
class Collected:
    """Numbers of a set of pictures under one condition. Q questions, S scores, P pictures, W words.

    Attributes:
        names: of the S scores.
        values: [Q, S, measures], NaN where a score or a target does not exist.
        asked: the Q questions.
        rows: [P, S, 24] share of a score in every row of patches of the picture, mean over its questions.
        agreement: [P, S] mean rank correlation between the questions of a picture.
        words: [P, W, 5] the measures of WORD.
        kinds: [Q, layers] rank correlation of the attention from content words and from function words.
    """

    names: tuple[str, ...]
    values: Array
    asked: tuple[Asked, ...]
    rows: Array
    agreement: Array
    words: Array
    kinds: Array

    def of(self, score: str, measure: str) -> dict[str, float]:
        """Question id -> value, of the questions that have one."""
        column = self.values[:, self.names.index(score), MEASURES.index(measure)]
        return {one.id: float(x) for one, x in zip(self.asked, column, strict=True) if not np.isnan(x)}

    @property
    def pictures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.picture for one in self.asked))

    @property
    def picture_of(self) -> dict[str, str]:
        """Question id -> picture."""
        return {one.id: one.picture for one in self.asked}


def collect(model: Llava, condition: str, pictures: Sequence[str], folder: Path) -> Collected:
    """Measure all scores of all questions about these pictures; what is in `folder` already is read from there."""
    data = benchmarks.get("gqa").load(DEFAULT_DATA, "testdev")
    by_id = {question.id: question for question in data.questions}
    asked = [one for one in scenes.questions() if one.picture in set(pictures)]
    home = folder / f"scores-{digest(model)}" / condition.replace(" ", "-")
    home.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Array]] = {}
    for name in tqdm(pictures, desc=condition, unit="picture", file=sys.stderr):
        file = home / f"{name}.npz"
        if not file.is_file():
            own = [one for one in asked if one.picture == name]
            samples = [data.sample(by_id[one.id]) for one in own]
            arrays = measure_picture(model, samples, own, condition)
            part = file.with_suffix(".part.npz")
            np.savez(part, **arrays)  # type: ignore[arg-type]
            part.replace(file)
        with np.load(file, allow_pickle=False) as stored:
            for key in stored.files:
                found.setdefault(key, []).append(stored[key].astype(np.float64))
    order = {name: place for place, name in enumerate(pictures)}
    asked.sort(key=lambda one: order[one.picture])
    whole = {key: np.concatenate(parts) if key in ASKED else np.stack(parts) for key, parts in found.items()}
    return Collected(score_names(model.spec.layers), asked=tuple(asked), **whole)


def digest(model: Llava) -> str:
    """Changes with the weights and with all code that the numbers depend on."""
    observer = Observer(budget=model.visual_tokens)
    parts = [model.fingerprint, combined(answer_sources(model, observer))]
    for module in (measures, scenes):
        path = Path(str(module.__file__))
        state = path.stat()
        parts.append(read_source(path, ROOT, state.st_mtime_ns, state.st_size)[0])
    return hashlib.sha256(repr((parts, MEASURES, WORD)).encode()).hexdigest()[:10]


def exchanged(image: Image.Image) -> Image.Image:
    """The picture with its upper and lower half exchanged: every patch keeps its pixels."""
    pixels = np.asarray(image)
    return Image.fromarray(np.roll(pixels, len(pixels) // 2, axis=0))


def measure_picture(
    model: Llava, samples: Sequence[Sample], asked: Sequence[Asked], condition: str
) -> dict[str, Array]:
    """The arrays of `Collected` for one picture.

    With halves exchanged all scores are moved back, so that index i is the same content in every condition; only the
    measures of lateness read where it stood.
    """
    picture = scenes.redraw(asked[0].picture)
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
    for row, one in enumerate(asked):
        values[row, places] = measure(scores[row], notes[ENCODER][row], picture, one, late)
    values[:, places, OTHERS] = of_others(scores, picture, asked)
    rows, agreement = np.full((len(names), 24), np.nan), np.full(len(names), np.nan)
    rows[places] = measures.share(scores).mean(0).reshape(len(known), 24, -1).sum(-1)
    if len(asked) > 1:
        agreement[places] = [measures.mean_pairwise(scores[:, place]) for place in range(len(known))]
    layers = [name.split()[1] for name in names if name.startswith(TEXT_KINDS[0])]
    kinds = np.full((len(asked), len(layers)), np.nan)
    for column, layer in enumerate(layers):
        if f"content {layer}" in notes:
            kinds[:, column] = measures.spearman(notes[f"content {layer}"], notes[f"function {layer}"])
    return {
        "values": values.astype(np.float32),
        "rows": rows.astype(np.float32),
        "agreement": agreement.astype(np.float32),
        "words": measure_words(word_cosines(model, tokens), picture).astype(np.float32),
        "kinds": kinds.astype(np.float32),
    }


def measure(scores: Array, encoder: Array, picture: Picture, one: Asked, late: NDArray[np.bool_]) -> Array:
    """[S, measures] of the scores [S, 576] of one question.

    Args:
        encoder: [576], what agreement is measured with.
        late: [576] bool, the patches that stand in the second half of the sequence.
    """
    found = np.full((len(scores), len(MEASURES)), np.nan)
    mask = picture.patches(one.targets)
    nothing = np.full(len(scores), np.nan)
    if mask.any():
        found[:, : len(TARGET)] = np.stack(
            [
                measures.auroc(scores, mask),
                measures.auroc(scores, mask, picture.owner >= 0) if set(picture.owner[~mask]) != {-1} else nothing,
                *[nothing] * 3,  # `of_others` fills them
                measures.average_precision(scores, mask),
                np.full(len(scores), mask.mean()),
                measures.lift(scores, mask),
                measures.recall(scores, mask, 32),
                measures.recall(scores, mask, 64),
                np.full(len(scores), mask.sum()),
                np.full(len(scores), np.flatnonzero(mask).mean() / (PATCHES - 1)),
            ],
            axis=-1,
        )
    found[:, len(TARGET) :] = np.stack(
        [
            scores.sum(-1),
            measures.share(scores)[:, late].sum(-1),
            measures.chosen(scores, 64)[:, late].mean(-1) * late.sum() / 64,
            measures.effective_share(scores),
            measures.gini(scores),
            measures.spearman(scores, encoder),
            *(measures.overlap(scores, encoder, count) for count in (32, 64, 128)),
        ],
        axis=-1,
    )
    return found


def of_others(scores: Array, picture: Picture, asked: Sequence[Asked]) -> Array:
    """[Q, S, 3] how well the scores [Q, S, 576] of other questions find the things of each question: AUROC, recalls.

    Only questions that share no thing count; NaN where there is none.
    """
    ranks = rankdata(scores, axis=-1)
    kept = [measures.chosen(scores, count) for count in (32, 64)]
    found = np.full((*scores.shape[:2], 3), np.nan)
    for row, one in enumerate(asked):
        mask = picture.patches(one.targets)
        other = [n for n, two in enumerate(asked) if two.targets and not set(two.targets) & set(one.targets)]
        if mask.any() and other:
            found[row, :, 0] = measures.auroc_of_ranks(ranks[other], mask).mean(0)
            for column, one_kept in enumerate(kept, 1):
                found[row, :, column] = one_kept[other][..., mask].mean((0, -1))
    return found


def word_cosines(model: Llava, tokens: Array) -> Array:
    """[W, 576] cosine of the input embedding of each of WORDS with every projected visual token [576, D]."""
    ids = torch.tensor([model.tokenizer.convert_tokens_to_ids(word) for word in WORDS])
    with torch.inference_mode():
        table = model.hf_model.get_input_embeddings()(ids.to(model.device)).double().cpu().numpy()
    unit = [rows / np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (table, tokens)]
    return unit[0] @ unit[1].T


def measure_words(cosines: Array, picture: Picture) -> Array:
    """[W, 5] the measures of WORD; NaN for a word that is true of no thing, or where a control does not exist."""
    found = np.full((len(WORDS), len(WORD)), np.nan)
    masks = np.stack([scenes.word_mask(picture, word) for word in WORDS])
    things = picture.owner >= 0
    for group in (range(len(COLOR_NAMES)), range(len(COLOR_NAMES), len(COLOR_NAMES) + len(SHAPES))):
        absent = [n for n in group if not masks[n].any()]
        for n in group:
            if not masks[n].any():
                continue
            others = things & ~masks[n]
            found[n, 0] = measures.auroc(cosines[n], masks[n])
            if others.any():
                found[n, 1] = measures.auroc(cosines[n], masks[n], things)
            if absent:
                found[n, 2] = measures.auroc(cosines[absent], masks[n]).mean()
                if others.any():
                    found[n, 3] = measures.auroc(cosines[absent], masks[n], things).mean()
            rest = [k for k in group if k != n and masks[k].any()]
            if rest:
                found[n, 4] = measures.auroc(cosines[rest], masks[n]).mean()
    return found
