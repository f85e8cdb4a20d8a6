"""Questions about scenes in Chinese, word for word from a fixed table."""

from collections.abc import Sequence

from toy.data.questions import Question
from toy.data.vocabulary import PLURALS

# English word -> Chinese word. Each Chinese word is one token, and its embedding starts from the English one's.
WORDS = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色",
    "purple": "紫色", "orange": "橙色", "cyan": "青色", "pink": "粉色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形",
    "cross": "十字形", "ring": "圆环", "heart": "心形",
    "small": "小", "big": "大", "object": "物体", "panel": "面板", "frame": "框",
    "striped": "条纹", "checkered": "方格", "dotted": "圆点",
    "yes": "是的", "no": "不是", "left": "左边", "right": "右边",
    "above": "上方", "below": "下方", "top": "上半", "bottom": "下半",
    "color": "颜色", "shape": "形状", "number": "数字", "image": "图中", "there": "有", "many": "几个",
    "what": "什么", "is": "是", "or": "还是", "on": "在", "of": "的", "in": "里", "?": "？",
}  # fmt: skip
# Words without an English one of their own.
PARTICLES = {"吗": "?", "几": "number"}
SINGULAR = {plural: shape for shape, plural in PLURALS.items()} | {"objects": "object"}


def translate(name: str) -> str:
    """ "small red stars" -> 小红色星形; digits stay."""
    return "".join(WORDS.get(SINGULAR.get(word, word), word) for word in name.split())


def in_chinese(question: Question, options: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Text and options of a question, from its program."""
    steps = dict(question.program)
    name = translate(steps["select"])
    return f"{TEXTS[question.family](steps, name)}？", tuple(map(translate, options))


def _between(steps: dict[str, str], step: str) -> tuple[str, list[str]]:
    """The first thing of a relation, and the words after it: one relation, or "left or right of"."""
    thing, relation = steps[step].split(",")
    return translate(thing), [WORDS[word] for word in relation.split() if word not in ("or", "of")]


def _relate(steps: dict[str, str], anchor: str) -> str:
    name, (side,) = _between(steps, "relate")
    return f"{anchor}的{side}的{name}是什么颜色"


def _verify(steps: dict[str, str], anchor: str) -> str:
    name, (side,) = _between(steps, "verify rel")
    return f"{name}在{anchor}的{side}吗"


def _choose(steps: dict[str, str], anchor: str) -> str:
    name, sides = _between(steps, "choose rel")
    return f"{name}在{anchor}的{sides[0]}还是{sides[1]}"


def _side(steps: dict[str, str], name: str) -> str:
    first, second = steps["choose position"].split("|")
    return f"{name}在{WORDS[first]}还是{WORDS[second]}"


TEXTS = {
    "color": lambda steps, name: f"{name}是什么颜色",
    "shape": lambda steps, name: f"{name}是什么形状",
    "relate": _relate,
    "exist": lambda steps, name: f"图中有{name}吗",
    "count": lambda steps, name: f"图中有几个{name}",
    "digit": lambda steps, name: f"{name}里的数字是几",
    "verify": _verify,
    "choose": _choose,
    "side": _side,
}
