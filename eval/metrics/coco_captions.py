"""The official caption scorer, pycocoevalcap, where it and Java are installed (pip install pycocoevalcap)."""

import importlib.util
import shutil
from collections.abc import Mapping, Sequence

from llava.errors import UserError

Scores = tuple[dict[str, float], list[float], float, float]


def available() -> str:
    """ "pycocoevalcap" where it can run, else "own" for the formulas of eval.metrics.captions."""
    installed = importlib.util.find_spec("pycocoevalcap") is not None and shutil.which("java") is not None
    return "pycocoevalcap" if installed else "own"


def described() -> str:
    """The scorer that will run, for results."""
    if available() == "own":
        return "this repository's CIDEr, BLEU and ROUGE-L (no pycocoevalcap or no Java)"
    from importlib.metadata import version

    return f"pycocoevalcap {version('pycocoevalcap')}"


def run(references: Mapping[str, Sequence[str]], captions: Mapping[str, str]) -> Scores:
    """CIDEr by image (0 to 10), BLEU-1 to -4, ROUGE-L and METEOR (0 to 1).

    Args:
        references: image id -> reference captions, raw and without line breaks.
        captions: image id -> caption, likewise.
    """
    if available() == "own":
        raise UserError("pycocoevalcap or Java is not installed; install both, or score with the engine 'own'.")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    known = tokens(references)
    said = tokens({name: [caption] for name, caption in captions.items()})
    try:
        _, ciders = Cider().compute_score(known, said)
        bleus, _ = Bleu(4).compute_score(known, said, verbose=0)
        rouge, _ = Rouge().compute_score(known, said)
        meteor, _ = Meteor().compute_score(known, said)
    except (OSError, ValueError) as error:
        raise UserError(
            f"pycocoevalcap failed ({error}); check that Java starts and has 2 GB of memory for METEOR."
        ) from error
    return dict(zip(known, map(float, ciders), strict=True)), list(map(float, bleus)), float(rouge), float(meteor)


def tokens(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The captions through the package's tokenizer, which is a Java program."""
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
