"""What a method gains and costs, beside `full` and beside its oracle.

Times to the first token are divided turn by turn, and the median of these ratios is taken: a machine that slows down
from turn to turn slows both. A ratio of two medians can come from two turns.
"""

from dataclasses import dataclass
from statistics import median

from eval.efficiency.latency.counts import Counts
from eval.efficiency.latency.measure import Measured
from eval.efficiency.peers.ratios import Ratio, over_rounds

SPREAD = 1.25  # a quarter of the turns apart: the machine was busy


@dataclass(frozen=True)
class Ratios:
    """docs/efficiency.md defines each.

    Attributes:
        ttft: time to first token of full over that of the method in the same turn, median over turns.
        ttft_interval: low and high end of the interval of that median.
        decode: seconds per token, likewise; None without decoding.
        end_to_end: output length -> seconds of full over those of the method.
        flops: operations of full over those of the method.
        realised: `ttft` / `flops`, the share of the theoretical speed-up that was measured.
        over_oracle: time to first token over that of the oracle with the same tokens in the same turn, less 1, median
            over turns; the price of choosing.
        over_oracle_interval: of that median.
        selection: selection and merging as a share of the time to first token.
        with_scores: the same with what the tower takes longer than for full, since scores are computed beside it.
        kv_bytes: of full over those of the method.
        peak: highest memory of the method over that of full.
        calm: slowest over fastest turn is below 1.25 for the method and for full.
    """

    ttft: float
    ttft_interval: tuple[float, float]
    decode: float | None
    end_to_end: dict[int, float]
    flops: float
    realised: float
    over_oracle: float | None
    over_oracle_interval: tuple[float, float] | None
    selection: float
    with_scores: float
    kv_bytes: float
    peak: float
    calm: bool


def ratios(
    full: Measured,
    ours: Measured,
    counts: tuple[Counts, Counts] | None = None,
    oracle: Measured | None = None,
) -> Ratios:
    """The ratios of a method.

    Args:
        counts: of full and of the method; without them operations are those of the closed formula.
        oracle: measured in the same turns.
    """
    most, least = (counts[0].flops, counts[1].flops) if counts else (full.flops, ours.flops)
    choosing = ours.seconds["selection"] + ours.seconds["merging"]
    faster, slower = turn_by_turn(full, ours), None if oracle is None else turn_by_turn(ours, oracle)
    return Ratios(
        ttft=faster.median,
        ttft_interval=(faster.low, faster.high),
        decode=None if not (full.decode and ours.decode) else full.decode / ours.decode,
        end_to_end={length: median(full.end_to_end[length]) / median(own) for length, own in ours.end_to_end.items()},
        flops=most / least,
        realised=faster.median * least / most,
        over_oracle=None if slower is None else slower.median - 1,
        over_oracle_interval=None if slower is None else (slower.low - 1, slower.high - 1),
        selection=choosing / ours.ttft,
        with_scores=(choosing + max(0.0, ours.seconds["vision"] - full.seconds["vision"])) / ours.ttft,
        kv_bytes=full.kv_bytes / ours.kv_bytes,
        peak=ours.peak_bytes / full.peak_bytes,
        calm=all(max(one.ttfts, default=1) < SPREAD * min(one.ttfts, default=1) for one in (full, ours)),
    )


def turn_by_turn(above: Measured, below: Measured) -> Ratio:
    """Seconds to the first token of one over those of another in the same turn, the median over turns.

    Raises:
        ValueError: they were not measured in the same number of turns.
    """
    return over_rounds([one / other for one, other in zip(above.ttfts, below.ttfts, strict=True)])
