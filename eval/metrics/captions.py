"""Caption scores against several references: CIDEr, BLEU-1 to -4, ROUGE-L, and METEOR where Java is there.

Official scorer: pycocoevalcap 1.2 (the COCO caption evaluation), through which lmms-eval computes these numbers. Where
the package and Java are installed, it is what runs. Elsewhere the formulas below run on eval.metrics.ptb: equal to the
package to the last digits on tests/data/captions. METEOR exists in Java only and is None then.

All numbers are times 100, as papers print them, in points. Differs from the official scorer:
  - line breaks inside a caption become blanks: the package hands all captions to its tokenizer as lines of one file, so
    a carriage return would give every later image a foreign caption;
  - SPICE, which lmms-eval leaves out too, is not computed.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from eval.metrics import Score, first_names, ratio_terms
from eval.metrics.gqa import grouped
from eval.metrics.ptb import tokenize
from llava.errors import UserError

LONGEST = 4  # words of the longest n-gram, in BLEU and CIDEr
SIGMA = 6.0  # of CIDEr's penalty on the difference in length
BETA = 1.2  # weight of recall in ROUGE-L
LINE_BREAKS = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# Below this many images a rare word is not told from a common one; the number is the papers' test set.
FEW_IMAGES = 1000

NGram = tuple[str, ...]
# References and caption of every image, tokens with blanks between them.
References = Mapping[str, Sequence[str]]
Captions = Mapping[str, str]


def score(
    references: References, captions: Captions, domains: Mapping[str, str] | None = None, engine: str = "auto"
) -> Score:
    """The numbers over all images of `captions`.

    Args:
        references: image id -> reference captions, raw; only those of images in `captions` count, for the weights of
            words in CIDEr too.
        captions: image id -> caption, raw.
        domains: image id -> the part of the set it belongs to. A part's CIDEr is the mean of its images' values under
            the weights of all images.
        engine: "own", "pycocoevalcap", or "auto" for the latter where it can run.
    """
    if lost := [name for name in captions if not references.get(name)]:
        raise UserError(f"{len(lost):,} captions are of images without references: {first_names(lost)}.")
    from eval.metrics import coco_captions

    engine = coco_captions.available() if engine == "auto" else engine
    kept = {name: [one_line(text) for text in references[name]] for name in captions}
    said = {name: one_line(text) for name, text in captions.items()}
    notes: list[str] = []
    meteor = None
    if engine == "own":
        kept = {name: [tokenize(text) for text in texts] for name, texts in kept.items()}
        said = {name: tokenize(text) for name, text in said.items()}
        ciders, bleus, rouge = cider(kept, said), bleu(kept, said), rouge_l(kept, said)
        notes.append("METEOR is not computed: it needs the package pycocoevalcap and Java")
    else:
        ciders, bleus, rouge, meteor = coco_captions.run(kept, said)
    if len(captions) < FEW_IMAGES:
        notes.append(
            f"CIDEr weighs words by how many of the {len(captions):,} scored images have them: "
            "it is not comparable with that of the whole set"
        )
    terms = ratio_terms(ciders, unit="image")
    values: dict[str, float | None] = {"cider": float(terms.value(terms.sums.sum(0)))}
    values |= {f"bleu_{n}": 100 * value for n, value in enumerate(bleus, start=1)}
    values |= {"meteor": None if meteor is None else 100 * meteor, "rouge_l": 100 * rouge}
    groups = {"domain": grouped(ciders, {name: domains[name] for name in ciders})} if domains else {}
    return Score(values, groups, {}, tuple(notes), "cider", frozenset({*values, *groups}), terms)


def one_line(text: str) -> str:
    """The caption without line breaks."""
    return LINE_BREAKS.sub(" ", text)


def ngrams(caption: str) -> Counter[NGram]:
    """How often each run of 1 to 4 tokens occurs."""
    words = caption.split()
    return Counter(
        tuple(words[start : start + size]) for size in range(1, LONGEST + 1) for start in range(len(words) - size + 1)
    )


def cider(references: References, captions: Captions) -> dict[str, float]:
    """CIDEr-D of every image, 0 to 10 as the package gives it.

    Per n-gram length: cosine of tf-idf vectors, the caption's weights cut at the reference's, times a Gaussian of the
    difference in length; then the mean over lengths and references. An n-gram's idf is log(images) minus the log of
    the number of images with it in any reference. Lengths are counted in word pairs, as officially.
    """
    counted = {name: [ngrams(text) for text in references[name]] for name in captions}
    images: Counter[NGram] = Counter()
    for counts in counted.values():
        images.update(set().union(*counts))
    total = math.log(len(captions)) if captions else 0.0
    idf = {gram: total - math.log(number) for gram, number in images.items()}
    return {
        name: 10 * float(np.mean([_similarity(_vectors(ngrams(captions[name]), idf, total), r) for r in vectors]))
        for name, counts in counted.items()
        for vectors in [[_vectors(count, idf, total) for count in counts]]
    }


Vectors = tuple[list[dict[NGram, float]], list[float], int]


def _vectors(counts: Mapping[NGram, int], idf: Mapping[NGram, float], unseen: float) -> Vectors:
    """Weights by n-gram length, their norms, and the official length."""
    weights: list[dict[NGram, float]] = [{} for _ in range(LONGEST)]
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * idf.get(gram, unseen)
    norms = [math.sqrt(sum(value * value for value in part.values())) for part in weights]
    return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)


def _similarity(caption: Vectors, reference: Vectors) -> float:
    """Mean over n-gram lengths."""
    total = 0.0
    for said, norm, known, known_norm in zip(*caption[:2], *reference[:2], strict=True):
        if norm and known_norm:
            shared = sum(min(value, known[gram]) * known[gram] for gram, value in said.items() if gram in known)
            total += shared / (norm * known_norm)
    return total / LONGEST * math.exp(-((caption[2] - reference[2]) ** 2) / (2 * SIGMA**2))


def bleu(references: References, captions: Captions) -> list[float]:
    """BLEU-1 to -4 over all images, 0 to 1: clipped precisions, and the length of the closest reference, the shorter
    one of two equally close."""
    right, guessed = np.zeros(LONGEST), np.zeros(LONGEST)
    spoken = needed = 0
    for name, caption in captions.items():
        known = [ngrams(text) for text in references[name]]
        most: Counter[NGram] = Counter()
        for counts in known:
            most |= counts
        for gram, count in ngrams(caption).items():
            right[len(gram) - 1] += min(count, most[gram])
        length = len(caption.split())
        guessed += [max(0, length - size) for size in range(LONGEST)]
        spoken += length
        needed += min((abs(len(text.split()) - length), len(text.split())) for text in references[name])[1]
    # The official guards against division by zero, which show in the last digits.
    precisions = (right + 1e-15) / (guessed + 1e-9)
    ratio = (spoken + 1e-15) / (needed + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(np.prod(precisions[:n]) ** (1 / n)) * brevity for n in range(1, LONGEST + 1)]


def rouge_l(references: References, captions: Captions) -> float:
    """Mean over images of the F of the longest common subsequence, 0 to 1, precision and recall each of the best
    reference. An empty caption is one empty token, as officially."""
    return float(np.mean([_rouge(references[name], caption) for name, caption in captions.items()] or [0.0]))


def _rouge(references: Sequence[str], caption: str) -> float:
    said = caption.split(" ")
    common = [(_common(said, known), len(known)) for known in (text.split(" ") for text in references)]
    precision = max(length / len(said) for length, _ in common)
    recall = max(length / size for length, size in common)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision and recall else 0.0


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            diagonal, row[column] = row[column], diagonal + 1 if word == other else max(row[column], row[column - 1])
    return row[-1]
