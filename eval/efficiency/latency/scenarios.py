"""The four scenarios, in the manner of MLPerf, and the plain measurement of one question."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """What is asked, how often and how much of an answer is written.

    Attributes:
        summary: for the help and the table.
        lengths: tokens of the answers.
        repeats: turns after the warm-up.
        differ: every turn asks about another image.
        video: the question is about a video.
        largest: batches grow by factors of two up to this size, or up to the largest that fits; None for those asked.
    """

    summary: str
    lengths: tuple[int, ...]
    repeats: int
    differ: bool = False
    video: bool = False
    largest: int | None = None


SCENARIOS = {
    "latency": Scenario("the same question again", (1, 16, 128), 5),
    "single-stream": Scenario("one question after another, each about another image", (16,), 20, differ=True),
    "offline": Scenario("growing batches, to the largest that fits", (16,), 3, largest=32),
    "long-answer": Scenario("one question with a long answer", (512,), 3),
    "video": Scenario("one question about a video", (1, 16, 128), 5, video=True),
}


def doubled(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `largest`."""
    sizes = [1]
    while 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)
