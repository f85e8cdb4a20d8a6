"""template_name in its official layout: short questions about scenes of the toy GQA."""

from pathlib import Path

from toy.benchmarks import about, asked, fresh, generator, images, link, linked, rotation, write_jsonl

PICTURES, EACH = 12, 3


def write(root: Path) -> None:
    """Everything below ROOT/template_name."""
    rng = generator("short answers")
    rows: list[dict[str, object]] = []
    for number, picture in enumerate(linked(PICTURES)):
        for pair in about(picture, "short", rng, rotation(number, EACH)):
            row = {"question_id": len(rows), "image": picture.file, "question": asked(pair), "answer": pair.answer}
            rows.append(row)
    folder = fresh(root / "template_name")
    write_jsonl(folder / "questions.jsonl", rows)
    link(folder / "images", images(root))
