"""Official metrics as pure functions that return a `Score`, one file per metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.yaml_files import read_yaml

Array = NDArray[np.float64]
WORDS: dict[str, str] = read_yaml(Path(__file__).with_name("words.yaml"))


@dataclass(frozen=True)
class SufficientStatistics:
    """A main number as a function of sums over units, so that intervals and paired tests can resample units.

    Every official metric here has this form. An accuracy is (right, all) -> right / all, an F1 is a function of summed
    true and false positives, and MME's score of summed counts per task.

    Attributes:
        unit: what one row is, for sentences: "question", "image pair", "group".
        names: [units] stable ids, the same for every answer file of a benchmark.
        clusters: [units] label of each unit's cluster; units of a cluster, mostly an image, are drawn together.
        sums: [units, terms].
        value: sums [..., terms] -> the number [...], vectorised over the leading dimensions.
        proportion: whether the number is 100 times a mean of sample scores in [0, 1]; a row of `sums` is then (sample
            score, 1).
        most: largest value of a number that is not a proportion and never below 0; None if it has no largest value.
    """

    unit: str
    names: tuple[str, ...]
    clusters: tuple[str, ...]
    sums: Array
    value: Callable[[Array], Array]
    proportion: bool = False
    most: float | None = None


@dataclass(frozen=True)
class Score:
    """The result of a metric on a set of predictions.

    Attributes:
        values: name -> number in the unit that the official script prints; None if it cannot be computed.
        groups: breakdown -> group -> (number in that unit, how many items it averages).
        correct: question id -> sample score in [0, 1], for intervals and tables; empty if questions have none.
        notes: what the reader must know about these numbers.
        main: the key in `values` of the number that papers print.
        points: keys of `values` and `groups` that are not percentages.
        terms: sufficient statistics of `main`, if it is not 100 x the mean of `correct`.
        other_terms: key in `values` -> sufficient statistics, for further numbers that papers print.
        kinds: name of a breakdown -> question id -> the group or groups it belongs to, for comparisons by group; empty
            if groups are not of single questions.
    """

    values: dict[str, float | None]
    groups: dict[str, dict[str, tuple[float, int]]]
    correct: dict[str, float]
    notes: tuple[str, ...] = field(default=())
    main: str = "accuracy"
    points: frozenset[str] = frozenset()
    terms: SufficientStatistics | None = None
    other_terms: Mapping[str, SufficientStatistics] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def ratio_terms(
    sample_scores: Mapping[str, float],
    clusters: Mapping[str, str] | None = None,
    unit: str = "question",
    scale: float = 100,
    proportion: bool = False,
) -> SufficientStatistics:
    """The sufficient statistics of `scale` times the mean sample score.

    Args:
        sample_scores: question id -> score.
        clusters: question id -> label of its cluster; by default every question is a cluster.
        proportion: whether `scale` is 100 and the scores are in [0, 1].
    """
    names = tuple(sample_scores)
    return SufficientStatistics(
        unit,
        names,
        tuple(clusters[name] for name in names) if clusters is not None else names,
        np.array([(sample_scores[name], 1.0) for name in names]).reshape(-1, 2),
        lambda sums: scale * divide(sums[..., 0], sums[..., 1]),
        proportion,
    )


def divide(above: Array, below: Array) -> Array:
    """above / below, and 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros_like(np.asarray(above, dtype=np.float64)), where=below != 0)


def first_names(names: Sequence[str], shown: int = 5) -> str:
    """The first few of a list, for an error."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
