"""Official metrics as pure functions on data. One file per metric; what they return is a `Score`."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """What a metric says about a set of predictions.

    Attributes:
        values: name -> number in the unit the official script prints; None if it cannot be computed.
        groups: breakdown name -> group -> (percent, number of questions).
        correct: question id -> credit in [0, 1], for intervals and tables; `values["accuracy"]` is 100 x its mean.
        notes: what the reader must know about these numbers.
    """

    values: dict[str, float | None]
    groups: dict[str, dict[str, tuple[float, int]]]
    correct: dict[str, float]
    notes: tuple[str, ...] = field(default=())
