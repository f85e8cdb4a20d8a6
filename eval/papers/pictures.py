"""What the methods of a table keep of one image: a picture for each, for the table's W&B run."""

from collections.abc import Sequence
from pathlib import Path

from eval.feature_cache import without_memory
from eval.figures.overlay_tiles import beside, draw_answer
from eval.papers.plan import Line, Where, split_of
from eval.papers.spec import Column
from eval.sweep import dataset, reducer_of
from llava.model.llava_arch import Llava
from llava.pipeline.generate import generate

NEW_TOKENS = 16
SIDE = 448  # longest side of a picture


def draw_kept(lines: Sequence[Line], column: Column, where: Where, model: Llava, folder: Path) -> dict[str, Path]:
    """Caption -> picture of the first question of a benchmark, for each method at the table's smallest budget."""
    data = dataset(column.benchmark, where.data, split_of(column, where))
    sample = data.sample(data.questions[0])
    if not sample.images:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    smallest = lines[-1].budget
    pictures = {}
    for line in lines:
        if line.setting is None or line.budget not in (None, smallest):
            continue
        reducer = reducer_of(line.setting, model.visual_tokens)
        answer = generate(without_memory(model), [sample], reducer, max_new_tokens=NEW_TOKENS).answers[0]
        picture = beside(draw_answer(sample, answer))
        picture.thumbnail((SIDE * 2, SIDE))
        path = folder / f"{line.method}.jpg"
        picture.save(path, quality=88)
        tokens = f"{answer.accounting.mean:.0f} of {answer.accounting.visual_tokens} tokens"
        pictures[f"{line.title}, {tokens}: {sample.question} {answer.text}"] = path
    return pictures
