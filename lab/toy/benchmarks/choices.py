"""Sets whose answer is one of the options.

Letters: ScienceQA, MMBench, MMBench-CN and SEED-Bench in their official layouts, MMStar, AI2D and MMMU as tables of the
hub. Yes or no: POPE, also as the hub holds it, and MME.
"""

import base64
import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.llava_files import LETTER, SHORT
from lab.toy.benchmarks import (
    ALL,
    IMAGE,
    INTEGER,
    LINKED,
    MANY,
    NAMES,
    OWNER,
    PAIRS,
    STRING,
    STRINGS,
    Picture,
    about,
    asked,
    cells,
    copied,
    fresh,
    generator,
    images,
    lettered,
    lettered_set,
    link,
    linked,
    objects,
    prompt,
    small,
    write_card,
    write_file,
    write_json,
    write_jsonl,
    write_splits,
    write_table,
)
from lab.toy.data.formats import LETTERS, TOLD, Pair, claim, distractors, draw
from lab.toy.data.questions import Question, Retry, ask, attempt, in_chinese, pick
from lab.toy.data.scenes import Thing
from lab.toy.data.vocabulary import COLOR_NAMES, SHAPES, SIZES

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
            first, *others = pair.question.split("\n")
            hint = first.removeprefix(CONTEXT) if first.startswith(CONTEXT) else ""
            problems[identity] = {
                "question": others[0] if hint else first,
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
            splits[split].append(identity)
            asked = {"from": "human", "value": f"<image>\n{pair.question}" if pictured else pair.question}
            entry = {"id": identity, "conversations": [asked, {"from": "gpt", "value": pair.answer}]}
            if pictured:
                entry["image"] = f"{identity}/image.png"
                write_file(folder / "images" / split / identity / "image.png", picture.png)
            prompts.append(entry)
        write_json(folder / f"llava_{split}_CQM-A.json", prompts)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits)


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


def write_seed_bench(root: Path) -> None:
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


# MMStar and AI2D.


def write_mmstar(root: Path) -> None:
    """Seventy-two questions, four for each of the finer categories."""
    folder = fresh(root / "hub" / "Lin-Chen" / "MMStar")
    columns = {"index": INTEGER, "question": STRING, "image": IMAGE, "answer": STRING}
    columns |= {"category": STRING, "l2_category": STRING}
    kinds = [
        (category, finer) for category, all_finer in NAMES["mmstar"].items() for finer in all_finer for _ in range(4)
    ]
    made = lettered_set(copied(22, 2), "mmstar", generator("mmstar"), len(kinds), 5)
    rows = [
        cells(picture, pair, index=index, category=category, l2_category=finer)
        for index, ((category, finer), (picture, pair)) in enumerate(zip(kinds, made, strict=True))
    ]
    write_table(folder / "mmstar.parquet", columns, rows)
    write_card(folder, {"val": {"val": "mmstar.parquet"}})


def write_ai2d(root: Path) -> None:
    """The answer is the place of the right option, as a string."""
    folder = fresh(root / "hub" / OWNER / "ai2d")
    columns = {"question": STRING, "options": STRINGS, "answer": STRING, "image": IMAGE}
    rows = [
        cells(picture, pair, question=asked(pair), options=list(pair.options), answer=str(LETTERS.index(pair.answer)))
        for picture, pair in lettered_set(copied(20, 6), "letters", generator("ai2d"), 60, 4)
    ]
    write_splits(folder, columns, {"test": rows})


# MMMU.

MMMU_COLUMNS = {"id": STRING, "question": STRING, "options": STRING, "explanation": STRING}
MMMU_COLUMNS |= dict.fromkeys([f"image_{number}" for number in range(1, 8)], IMAGE)
MMMU_COLUMNS |= dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type", "subfield"), STRING)
ALWAYS = {"explanation": "", "img_type": "['Drawings']", "topic_difficulty": "Easy"}


def write_mmmu(root: Path) -> None:
    """Everything below ROOT/hub/lmms-lab-encoder/MMMU: two questions for each subject, some of them open."""
    folder, rng, pictures = fresh(root / "hub" / OWNER / "MMMU"), generator("mmmu"), copied(20, 8)
    rows, subjects = [], list(chain.from_iterable(NAMES["mmmu"]))
    for number, subject in enumerate(subjects):
        picture = pictures[number % len(pictures)]
        if number % 10 == 9:
            second = which_picture(pictures[number % 20], pictures[(number + 5) % 20], rng, number % 20 > 9)
        elif number % 2:
            second = mmmu_cells(next(about(picture, "short", rng, ALL[number % 5 :])), picture)
        else:
            second = with_options(picture, rng, number // 2)
        for place, asked_cells in enumerate((with_options(picture, rng, number), second), start=1):
            rows.append({"id": f"validation_{subject}_{place}", "subfield": subject, **ALWAYS, **asked_cells})
    # The answers of the test split are not public.
    hidden = [
        {"id": f"test_{subject}_1", "subfield": subject, **ALWAYS, **with_options(picture, rng, number), "answer": "?"}
        for number, (subject, picture) in enumerate(zip(subjects, copied(8, 60), strict=False))
    ]
    write_splits(folder, MMMU_COLUMNS, {"validation": rows, "test": hidden}, card=True)


def with_options(picture: Picture, rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A question with four options."""
    return mmmu_cells(lettered(picture, "letters", rng, number, (MANY[number % len(MANY)], *MANY)), picture)


def mmmu_cells(pair: Pair, picture: Picture) -> dict[str, Any]:
    """A question about one picture, whose place MMMU marks in the text; options are a Python list as text."""
    return {
        "question": f"<image 1> {asked(pair)}",
        "options": repr(list(pair.options)),
        "image_1": picture.cell,
        "answer": pair.answer,
        "question_type": "multiple-choice" if pair.options else "open",
    }


def which_picture(first: Picture, second: Picture, rng: np.random.Generator, swap: bool) -> dict[str, Any]:
    """Which of two pictures, both options, holds an object."""
    own = sorted(objects(first) - objects(second))
    pictures = (second, first) if swap else (first, second)
    return {
        "question": f"Which image contains a {own[int(rng.integers(len(own)))]}?",
        "options": repr(["<image 1>", "<image 2>"]),
        "image_1": pictures[0].cell,
        "image_2": pictures[1].cell,
        "answer": LETTERS[pictures.index(first)],
        "question_type": "multiple-choice",
    }


# POPE. Objects are a colour and a shape. An image has three objects that it holds and, for each category, three that it
# does not: drawn at random, the commonest over all images, or those that are most often seen with the objects of the
# image.

# In the order of LLaVA's question file, with the offsets of its ids.
CATEGORIES = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
PICTURES, EACH = 16, 3
POPE_FIRST = 40  # scene
LABELS = ("yes", "no")  # of the objects of an image, by turns


def negatives(category: str, held: set[str], everything: Sequence[set[str]], rng: np.random.Generator) -> list[str]:
    """Objects that an image does not hold, by POPE's three rules; ties in alphabetical order."""
    absent = sorted({f"{color} {shape}" for color in COLOR_NAMES for shape in SHAPES} - held)
    if category == "random":
        return [absent[place] for place in rng.permutation(len(absent))[:EACH]]
    counts: Counter[str] = Counter()
    for other in everything:
        # How often an object is seen at all, or together with each object of this image.
        weight = 1 if category == "popular" else len(other & held)
        counts.update(dict.fromkeys(other, weight))
    return sorted(absent, key=lambda name: (-counts[name], name))[:EACH]


def pope_lines(pictures: Iterable[Picture]) -> dict[str, list[dict]]:
    """The lines of POPE's three files."""
    everything = [objects(picture) for picture in linked(2 * LINKED)]
    lines: dict[str, list[dict]] = {category: [] for category in CATEGORIES}
    for picture in pictures:
        held = objects(picture)
        rng = generator("pope", picture.name)
        present = [sorted(held)[place] for place in rng.permutation(len(held))[:EACH]]
        for category, own in lines.items():
            absent = negatives(category, held, everything, rng)
            names = [name for pair in zip(present, absent, strict=True) for name in pair]
            for name, label in zip(names, LABELS * EACH, strict=True):
                text = f"Is there a {name} in the image?"
                own.append({"question_id": len(own) + 1, "image": picture.file, "text": text, "label": label})
    return lines


def write_pope(root: Path) -> None:
    """Everything below ROOT/pope, and the same questions about the same files as a table below ROOT/hub."""
    pictures = small((picture for picture in linked(140, POPE_FIRST) if len(objects(picture)) >= EACH), PICTURES)
    files = {picture.file: {"bytes": picture.original, "path": picture.file} for picture in pictures}
    folder, prompts, table = fresh(root / "pope"), [], []
    for category, rows in pope_lines(pictures).items():
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", rows)
        for row in rows:
            number, image, text = row["question_id"], row["image"], row["text"]
            prompts.append(prompt(CATEGORIES[category] + number, image, f"{text}\n{SHORT}", category))
            asked = {"id": str(len(table)), "question_id": str(number), "question": text, "answer": row["label"]}
            table.append(asked | {"image_source": image[:-4], "image": files[image], "category": category})
    write_jsonl(folder / "llava_pope_test.jsonl", prompts)
    link(folder / "val2014", images(root))
    columns = dict.fromkeys(("id", "question_id", "question", "answer", "image_source"), STRING)
    columns |= {"image": IMAGE, "category": STRING}
    write_splits(fresh(root / "hub" / "lmms-lab-encoder" / "POPE"), columns, {"test": table}, card=True)


# MME: fourteen tasks, two questions about every image, one right and one wrong.

IMAGES_EACH, TRIES = 5, 400
INSTRUCTION = "Please answer yes or no."

YesNo = tuple[str, str]  # the question whose answer is yes, and the one whose answer is no
Wanted = Callable[[str], bool]  # of the name of a thing
THINGS: dict[str, Wanted] = {
    "all": bool,
    "panels": lambda name: name.endswith("panel"),
    "colours": lambda name: name.endswith(" objects"),
    "shapes": lambda name: not name.endswith(" objects"),
    "sized": lambda name: name.split()[0] in SIZES,
    "unsized": lambda name: name.split()[0] not in SIZES,
    "plain": lambda name: not name.endswith("panel") and name.split()[0] not in SIZES,
}
IN_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")


def yes_and_no(things: tuple[Thing, ...], family: str, wanted: Wanted, rng: np.random.Generator) -> YesNo:
    """A question with each answer: whether a thing is there, whether a relation holds, else two claims about a thing.

    Raises:
        Retry: the draw found no such questions.
    """
    texts: dict[str, str] = {}
    for _ in range(TRIES):
        try:
            question = draw(things, rng, family)
        except Retry:
            if family != "exist":
                raise
            continue
        name = dict(question.program)["select"]
        if family not in ("exist", "verify"):
            if not wanted(name):
                raise Retry
            return claim(question, question.answer), claim(question, pick(distractors(question), rng))
        if wanted(name):
            text = question.text if family == "verify" else f"Is there a {name} in the image?"
            texts.setdefault(question.answer, text)
        if len(texts) == 2:
            return texts["yes"], texts["no"]
    raise Retry


def write_mme(root: Path) -> None:
    """Everything below ROOT/MME."""
    folder, lines = fresh(root / "MME"), []
    release = folder / "MME_Benchmark_release_version"
    for number, task in enumerate(NAMES["mme"]):
        pictures, answers = (f"{task}/images", f"{task}/questions_answers_YN") if task in IN_FOLDERS else (task, task)
        kind, family, things = NAMES["mme"][task]
        made = 0  # for the first pictures of the task's kind that its questions can be asked about
        for picture in copied(120, first=3 * number):
            if picture.dense != (kind == "dense") or made == IMAGES_EACH:
                continue
            rng = generator("mme", task, picture.name)
            texts = attempt(lambda: yes_and_no(picture.things, family, THINGS[things], rng), TRIES)  # noqa: B023
            if texts is None:
                continue
            made += 1
            name = f"{pictures}/{picture.file}"
            write_file(release / name, picture.jpeg)
            listed = [f"{text} {INSTRUCTION}\t{answer}\n" for text, answer in zip(texts, ("Yes", "No"), strict=True)]
            write_file(release / answers / f"{picture.name}.txt", "".join(listed))
            lines += [prompt(name, name, f"{text}\n{SHORT}", task) for text in texts]
    write_jsonl(folder / "llava_mme.jsonl", lines)
