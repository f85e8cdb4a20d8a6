"""What a W&B run shows of single samples: a table with small images, and overlays of kept tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.pipeline.accounting import Answer, Batch
    from llava.processing.prompt import Sample

TABLE_ROWS = 200
TABLE_PICTURES = 32  # rows of the sample table with images
PICTURES = 8
SIDE = 448  # longest side of an image in the sample table
COLUMNS = (
    "question_id",
    "picture",
    "kept tokens",
    "question",
    "reference",
    "answer",
    "credit",
    "tokens per layer",
)


class Drawings:
    """The first samples of this process that have images, with their answers; drawn when the run is complete."""

    def __init__(self, wandb: Any):
        self._wandb = wandb
        self._kept: dict[str, tuple[Sample, Answer, float | None]] = {}

    def add(self, samples: Sequence["Sample"], batch: "Batch", credits: Sequence[float]) -> None:
        """Keep what is needed to draw these samples.

        Args:
            credits: score of each answer; empty where the benchmark has none for single answers.
        """
        known: Sequence[float | None] = credits or [None] * len(samples)
        for sample, answer, credit in zip(samples, batch.answers, known, strict=True):
            if len(self._kept) < TABLE_PICTURES and sample.image is not None:
                self._kept[sample.id] = (sample, answer, credit)

    def table(self, rows: Sequence[Sequence[Any]]) -> Any:
        """A wandb.Table of rows in the order of COLUMNS; images are made small and overlays are added."""
        from eval.figures.overlay import draw_answer, draw_original

        data = []
        for name, picture, kept, *rest in rows:
            if picture is not None:
                picture = self._thumbnails([draw_original(one) for one in images_of(picture)])
            if name in self._kept:
                sample, answer, _ = self._kept[name]
                kept = self._thumbnails(draw_answer(sample, answer))
            data.append([name, picture, kept, *rest])
        return self._wandb.Table(columns=list(COLUMNS), data=data)

    def gallery(self) -> list[Any]:
        """The first images of this process as wandb.Image, each beside the tokens that were kept of it."""
        from eval.figures.overlay import beside, draw_answer, draw_original

        pictures = []
        for sample, answer, credit in list(self._kept.values())[:PICTURES]:
            tokens = f"{answer.accounting.mean:.0f} of {answer.accounting.visual_tokens} tokens"
            verdict = "" if credit is None else "right, " if credit == 1 else "wrong, "
            caption = f"{sample.question} {answer.text} ({verdict}{tokens})"
            for original, overlay in zip(sample.images, draw_answer(sample, answer), strict=True):
                pictures.append(self._wandb.Image(beside([draw_original(original), overlay]), caption=caption))
        return pictures

    def _thumbnails(self, pictures: Sequence[Any]) -> Any:
        """Images side by side, small enough for a table."""
        from eval.figures.overlay import beside

        picture = beside(pictures)
        picture.thumbnail((SIDE * len(pictures), SIDE))
        return self._wandb.Image(picture, file_type="jpg")


def images_of(picture: Any) -> tuple[Any, ...]:
    """The images of a sample, of which there may be several."""
    return picture if isinstance(picture, tuple) else (picture,)
