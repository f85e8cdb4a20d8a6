"""Caption scores against several references: CIDEr, BLEU-1 to -4, ROUGE-L, and METEOR where Java is installed.

Official scorer: pycocoevalcap 1.2 (the COCO caption evaluation), through which lmms-eval computes these numbers. It
computes them here too; see eval/metrics/coco_captions.py for what runs without Java.

All numbers are times 100, as papers print them, in points. Differs from the official scorer:
  - line breaks inside a caption become blanks: the package passes all captions to its tokenizer as lines of one file,
    so that a carriage return would shift the captions of all later images;
  - SPICE, which lmms-eval leaves out too, is not computed.
"""

import re
from collections.abc import Mapping, Sequence

from eval.metrics import Score, coco_captions, first_names, ratio_terms
from eval.metrics.accuracy import grouped
from llava.errors import UserError

LINE_BREAKS = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# Below this many images a rare word is not told from a common one; the number is the papers' test set.
FEW_IMAGES = 1000


def score(
    references: Mapping[str, Sequence[str]],
    captions: Mapping[str, str],
    domains: Mapping[str, str] | None = None,
    java: bool | None = None,
) -> Score:
    """The numbers over all images of `captions`.

    Args:
        references: image id -> reference captions, raw; only those of images in `captions` count, also for the word
            weights of CIDEr.
        captions: image id -> caption, raw.
        domains: image id -> the part of the set it belongs to. A part's CIDEr is the mean of its images' values under
            the word weights of all images.
        java: whether to run the official tokenizer and METEOR, which are Java programs; None if Java is installed.
    """
    coco_captions.check_installed()
    if lost := [name for name in captions if not references.get(name)]:
        raise UserError(f"{len(lost):,} captions are of images without references: {first_names(lost)}.")
    java = coco_captions.has_java() if java is None else java
    known = coco_captions.tokenize({name: list(map(one_line, references[name])) for name in captions}, java)
    said = coco_captions.tokenize({name: [one_line(text)] for name, text in captions.items()}, java)
    terms = ratio_terms(coco_captions.cider(known, said), unit="image")
    values: dict[str, float | None] = {"cider": float(terms.value(terms.sums.sum(0)))}
    values |= {f"bleu_{n}": 100 * value for n, value in enumerate(coco_captions.bleu(known, said), start=1)}
    values["meteor"] = 100 * coco_captions.meteor(known, said) if java else None
    values["rouge_l"] = 100 * coco_captions.rouge_l(known, said)
    notes = [] if java else ["METEOR is not computed: it needs Java"]
    if len(captions) < FEW_IMAGES:
        notes.append(
            f"CIDEr weighs words by how many of the {len(captions):,} scored images have them: "
            "it is not comparable with that of the whole set"
        )
    by_image = dict(zip(terms.names, map(float, terms.sums[:, 0]), strict=True))
    groups = {"domain": grouped(by_image, {name: domains[name] for name in by_image})} if domains else {}
    return Score(values, groups, {}, tuple(notes), "cider", frozenset({*values, *groups}), terms)


def one_line(text: str) -> str:
    """The caption without line breaks."""
    return LINE_BREAKS.sub(" ", text)
