"""ScienceQA, MMBench, MMBench-CN and SEED-Bench in their official layouts: answers that are a letter."""

import base64
import csv
import io
from collections.abc import Iterator
from pathlib import Path

from eval.benchmarks.llava_files import LETTER
from toy.benchmarks import (
    MANY,
    NAMES,
    PAIRS,
    Picture,
    copied,
    fresh,
    generator,
    images,
    lettered,
    lettered_set,
    link,
    linked,
    prompt,
    write_file,
    write_json,
    write_jsonl,
)
from toy.data.formats import LETTERS, TOLD, Pair, distractors
from toy.data.questions import Question, ask, in_chinese


def write_choices(root: Path) -> None:
    """Everything below ROOT/scienceqa, ROOT/mmbench, ROOT/mmbench_cn and ROOT/seed_bench."""
    write_scienceqa(root)
    write_mmbench(root)
    write_seed(root)


# ScienceQA.

# Questions of each split, half of them with a picture.
SPLITS = {"test": 40, "val": 8}
CONTEXT = "Context: "


def write_scienceqa(root: Path) -> None:
    """Questions with a picture and, by turns, questions that their context alone answers."""
    folder, rng = fresh(root / "scienceqa"), generator("scienceqa")
    problems: dict[str, dict] = {}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    pictures = iter(copied(sum(SPLITS.values())))
    for split, count in SPLITS.items():
        prompts = []
        for number, picture in zip(range(count), pictures, strict=False):
            pictured, identity = number % 2 == 0, str(4 + 5 * len(problems))
            name, family = ("context", MANY[number % 5]) if pictured else ("context_text", TOLD[number % 3])
            # Two to five options by turns, the right one at every place by turns.
            place, options = divmod(number // 2, 4)
            pair = lettered(picture, name, rng, place, (family, *MANY[:2]), 2 + options)
            problems[identity] = _problem(pair, pictured, split)
            splits[split].append(identity)
            prompts.append(_prompt(pair, pictured, identity))
            if pictured:
                write_file(folder / "images" / split / identity / "image.png", picture.png)
        write_json(folder / f"llava_{split}_CQM-A.json", prompts)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits)


def _problem(pair: Pair, pictured: bool, split: str) -> dict:
    """An entry of problems.json."""
    lines = pair.question.split("\n")
    hint = lines[0].removeprefix(CONTEXT) if lines[0].startswith(CONTEXT) else ""
    return {
        "question": lines[bool(hint)],
        "choices": list(pair.options),
        "answer": LETTERS.index(pair.answer),
        "hint": hint,
        "image": "image.png" if pictured else None,
        "task": "closed choice",
        "grade": "grade1",
        "subject": "natural science",
        "topic": "drawn scenes",
        "category": pair.family,
        "skill": pair.family,
        "lecture": "",
        "solution": "",
        "split": split,
    }


def _prompt(pair: Pair, pictured: bool, identity: str) -> dict:
    """An entry of LLaVA's question file."""
    asked = {"from": "human", "value": f"<image>\n{pair.question}" if pictured else pair.question}
    entry = {"id": identity, "conversations": [asked, {"from": "gpt", "value": pair.answer}]}
    return entry | {"image": f"{identity}/image.png"} if pictured else entry


# MMBench.

GROUPS, PAIR_GROUPS, ROUND = 26, 4, 1_000_000
# The test split, whose answers are not public: a few of the groups about other pictures.
TEST_GROUPS = 2
# Every row repeats its picture.
ROW_QUALITY = 45
HINT = "Context: Look at the image."
# Files of the English and the Chinese set.
FILES = ("mmbench_{}_20230712.tsv", "mmbench_{}_cn_20231003.tsv")
HEADER = (
    *("index", "question", "hint", *LETTERS[:4], "answer", "category", "l2-category"),
    *("image", "source", "comment", "split"),
)


Group = tuple[Picture, Question, list[str]]


def groups(first: int) -> Iterator[Group]:
    """Questions with four options, then some with two; the right option's place goes round."""
    rng, pictures = generator("mmbench", first), [picture for picture in copied(30, first) if not picture.dense]
    for number in range(GROUPS + PAIR_GROUPS):
        picture, pair = pictures[number % len(pictures)], number >= GROUPS
        family = PAIRS[number % len(PAIRS)] if pair else MANY[number // 2 % len(MANY)]
        # Of the family, or of the next one where the scene allows none.
        question = next(filter(None, (ask(picture.things, other, rng) for other in (family, *MANY))))
        wrong = distractors(question)
        options = [wrong[place] for place in rng.permutation(len(wrong))[: 1 if pair else 3]]
        options.insert(number % (2 if pair else 4), question.answer)
        yield picture, question, options


def write_mmbench(root: Path) -> None:
    """Both languages: one row for every shift of the options, as the release has them."""
    dev, test = list(groups(0)), list(groups(30))[:TEST_GROUPS]
    folders = fresh(root / "mmbench"), fresh(root / "mmbench_cn")
    for chinese, (folder, file) in enumerate(zip(folders, FILES, strict=True)):
        for split, made in (("dev", dev), ("test", test)):
            write_tsv(folder / file.format(split), made, split, bool(chinese))


def write_tsv(path: Path, made: list[Group], split: str, chinese: bool) -> None:
    """The rows in the order of the release: all groups unshifted, then all groups shifted once, ..."""
    out = io.StringIO()
    header = [name for name in HEADER if split == "dev" or name != "answer"]
    table = csv.DictWriter(out, header, delimiter="\t", lineterminator="\n", restval="", extrasaction="ignore")
    table.writeheader()
    for shift in range(4):
        for number, (picture, question, options) in enumerate(made):
            if shift >= len(options):
                continue
            shifted = [*options[shift:], *options[:shift]]
            text, shown = in_chinese(question, shifted) if chinese else (question.text, shifted)
            category, broader = NAMES["mmbench"][question.family]
            row = {"index": 241 + 7 * number + shift * ROUND, "question": text, "category": category}
            row |= {"l2-category": broader, "answer": LETTERS[shifted.index(question.answer)], "split": split}
            row |= dict(zip(LETTERS, shown, strict=False))
            row |= {"hint": HINT if number % 7 == 3 and not chinese else "", "source": "drawn scenes"}
            table.writerow(row | {"image": base64.b64encode(picture.compressed(ROW_QUALITY)).decode()})
    write_file(path, out.getvalue())


# SEED-Bench.

# The first type about videos.
FIRST_VIDEO = 10
IMAGE_QUESTIONS, VIDEO_QUESTIONS = 16, 3


def write_seed(root: Path) -> None:
    """Images are linked; a video type has the middle frame of each video as its own file."""
    folder = fresh(root / "seed_bench")
    questions, lines = [], []
    for kind, (name, family) in NAMES["seed_bench"].items():
        rng, video = generator("seed", name), kind >= FIRST_VIDEO
        count = VIDEO_QUESTIONS if video else IMAGE_QUESTIONS
        pictures = copied(3 * count, 5 * kind) if video else linked(4 * count, 12 * kind)
        for picture, pair in lettered_set(pictures, "letters", rng, count, 1, (family,)):
            identity = f"v{len(questions)}" if video else str(101_000 + len(questions))
            if video:
                image = f"SEED-Bench-video-image/{kind}_{identity}.png"
                write_file(folder / image, picture.png)
            else:
                image = f"SEED-Bench-image/{picture.file}"
            record = {f"choice_{letter.lower()}": text for letter, text in zip(LETTERS, pair.options, strict=False)}
            record |= {"answer": pair.answer, "question": pair.question.split("\n")[0], "question_id": identity}
            record |= {"question_type_id": kind, "data_type": "video" if video else "image"}
            questions.append(record | {"data_id": f"{picture.name}.mp4" if video else picture.file})
            lines.append(prompt(identity, image, f"{pair.question}\n{LETTER}", str(record["data_type"])))
    numbers = {name: kind for kind, (name, _) in NAMES["seed_bench"].items()}
    write_json(folder / "SEED-Bench.json", {"questions": questions, "question_type": numbers})
    write_jsonl(folder / "llava-seed-bench.jsonl", lines)
    link(folder / "SEED-Bench-image", images(root))
