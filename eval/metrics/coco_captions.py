"""The official caption scorer: pycocoevalcap 1.2, the COCO caption evaluation.

CIDEr, BLEU and ROUGE-L of the package are Python. Its tokenizer and METEOR are Java programs: without Java,
eval.metrics.ptb gives the same tokens and METEOR is not computed. The package is imported only when it is needed.
"""

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from eval.metrics import ptb
from llava.errors import UserError

# Image id -> captions; a scored caption is a list of one.
Captions = Mapping[str, Sequence[str]]


def has_java() -> bool:
    """Whether the official tokenizer and METEOR can run."""
    return shutil.which("java") is not None


def described() -> str:
    """The scorer that will run, for results."""
    check_installed()
    tokenizer = "its own tokenizer" if has_java() else "this repository's tokenizer, no METEOR: Java is not installed"
    return f"pycocoevalcap {version('pycocoevalcap')} with {tokenizer}"


def check_installed() -> None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError(
            "Captions are scored with pycocoevalcap, which is not installed; pip install pycocoevalcap==1.2."
        )


def tokenize(captions: Captions, java: bool) -> dict[str, list[str]]:
    """Tokens with a blank between them, of captions without line breaks."""
    if not java:
        return {name: [ptb.tokenize(text) for text in texts] for name, texts in captions.items()}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    try:
        found = PTBTokenizer().tokenize(
            {name: [{"caption": text} for text in texts] for name, texts in captions.items()}
        )
    except OSError as error:
        raise UserError(f"pycocoevalcap's tokenizer failed ({error}); its folder must be writable.") from error
    if {name: len(texts) for name, texts in found.items()} != {name: len(texts) for name, texts in captions.items()}:
        raise UserError("pycocoevalcap's tokenizer did not answer for every caption; check that Java starts.")
    return found


def cider(references: Captions, captions: Captions) -> dict[str, float]:
    """CIDEr-D of every image, 0 to 10, of tokenized captions."""
    from pycocoevalcap.cider.cider import Cider

    if not any(text.split() for texts in references.values() for text in texts):
        # The package raises an error where no reference has a word.
        return dict.fromkeys(references, 0.0)
    _, values = Cider().compute_score(references, captions)
    return dict(zip(references, map(float, values), strict=True))


def bleu(references: Captions, captions: Captions) -> list[float]:
    """BLEU-1 to -4 over all images, 0 to 1, of tokenized captions."""
    from pycocoevalcap.bleu.bleu import Bleu

    values, _ = Bleu(4).compute_score(references, captions, verbose=0)
    return list(map(float, values))


def rouge_l(references: Captions, captions: Captions) -> float:
    """ROUGE-L over all images, 0 to 1, of tokenized captions."""
    from pycocoevalcap.rouge.rouge import Rouge

    if not captions:
        return 0.0
    return float(Rouge().compute_score(references, captions)[0])


def meteor(references: Captions, captions: Captions) -> float:
    """METEOR over all images, 0 to 1, of tokenized captions. Needs Java."""
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        return float(Meteor().compute_score(references, captions)[0])
    except (OSError, ValueError) as error:
        raise UserError(f"METEOR failed ({error}); check that Java starts and has 2 GB of memory.") from error
