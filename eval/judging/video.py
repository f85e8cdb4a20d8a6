"""How video answers are judged: the Video-ChatGPT protocol as Video-LLaVA's eval_video_qa.py runs it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers.jsonl import read_json
from eval.benchmarks.base import Question
from eval.benchmarks.video import metric as video_judge
from eval.judging import Judging, Request, Verdict, prompts
from eval.metrics import Score
from llava.errors import UserError

OFFICIAL = "gpt-3.5-turbo"
# The official script asks again for ever; a judge that does not keep to the format would never come to an end.
TRIES = 5

NOTE = "accuracy_match and score_match (5 or 0) say whether a text holds the answer's words: no published metric"


def video_judging(
    benchmark: str,
    questions: Mapping[str, Question],
    raw: Mapping[str, str],
    types: Mapping[str, str],
    notes: Callable[[Sequence[str]], tuple[str, ...]],
    extra: Callable[[Sequence[str], Mapping[str, str]], Score] | None = None,
) -> Judging:
    """The judging of a video set.

    Args:
        raw: question id -> the question as the data set words it, which is what the judge sees.
        types: question id -> type, where there are any.
        notes: ids that were asked -> what a reader must know of them.
    """

    def requests(asked: Sequence[str], texts: Mapping[str, str]) -> list[Request]:
        return [request(name, raw[name], questions[name].answer, texts[name]) for name in asked]

    def score(asked: Sequence[str], verdicts: Mapping[str, Verdict]) -> Score:
        judged = {name: verdicts[name]["judgement"] for name in asked if name in verdicts}
        return video_judge.score(judged, types, videos(judged), notes=notes(asked))

    def match(asked: Sequence[str], texts: Mapping[str, str]) -> Score:
        judged = {name: video_judge.match(texts[name], questions[name].answer) for name in asked}
        names = ("accuracy_match", "score_match")
        return video_judge.score(judged, types, videos(judged), names, (NOTE, *notes(asked)))

    def videos(names: Mapping[str, Any]) -> dict[str, str]:
        return {name: questions[name].image for name in names}

    ids = {question.official or question.id: question.id for question in reversed(list(questions.values()))}
    return Judging(
        benchmark=benchmark,
        official=OFFICIAL,
        main="accuracy",
        requests=requests,
        parse=parse,
        read=lambda path: read(path, ids),
        score=score,
        match=match,
        tries=TRIES,
        extra=extra,
        text=lambda verdict: verdict.get("text"),
    )


def request(name: str, question: str, answer: str, text: str) -> Request:
    """What the judge is asked. The official script leaves temperature and length to the service."""
    system, user = prompts()["video_qa_gpt_judge"]["messages"]
    content = fill(user["content"], {"{question}": question, "{answer}": answer, "{pred}": text})
    return Request(name, (system, {"role": "user", "content": content}))


def fill(template: str, slots: Mapping[str, str]) -> str:
    """A template with its slots filled in order; what is filled in is not searched for slots again."""
    parts = []
    for slot, value in slots.items():
        before, _, template = template.partition(slot)
        parts += [before, value]
    return "".join([*parts, template])


def parse(name: str, reply: str) -> Verdict | None:
    """The reply's dictionary."""
    found = video_judge.parse(reply)
    return None if found is None else {"judgement": found}


def read(path: Path, ids: Mapping[str, str]) -> dict[str, Verdict]:
    """Official verdicts: a folder with one ID.json per question, or the file they were merged into.

    Args:
        ids: the set's own question id -> ours.
    """
    files = {file.stem: file for file in sorted(path.glob("*.json"))}
    entries = {name: read_json(file) for name, file in files.items()} if path.is_dir() else read_json(path)
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            f"{path} should hold verdicts: a folder with one JSON file per question, or one that maps ids to them."
        )
    return {ids.get(name, name): verdict(entry, f"{path} entry {name}") for name, entry in entries.items()}


def verdict(entry: Any, where: str) -> Verdict:
    """[judgement, {"q", "a", "pred"}] of the official script."""
    if not isinstance(entry, list) or not entry:
        raise UserError(f"{where} should be a list of a judgement and what was judged.")
    judged = entry[1] if len(entry) > 1 and isinstance(entry[1], dict) else {}
    text = judged.get("pred")
    return {"judgement": entry[0], **({"text": text} if isinstance(text, str) else {})}
