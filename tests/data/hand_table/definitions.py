"""The statistics of docs/statistics.md once more, written from the page; nothing of the project is imported."""

import itertools
import math
from fractions import Fraction

import numpy as np
from scipy import stats
from scipy.optimize import brentq

DRAWS = 10_000
FEWEST, DECIDING = 20, 3


def text(value, digits=1, sign=False):
    """A decimal number; exact ties go away from zero."""
    exact = Fraction(value).limit_denominator(10**7)
    units = math.floor(abs(exact) * 10**digits + Fraction(1, 2))
    whole, rest = divmod(units, 10**digits)
    front = "-" if exact < 0 else "+" * sign
    return f"{front}{whole}" + (f".{rest:0{digits}d}" if digits else "")


def brackets(low, high, sign=False):
    return "[n/a]" if low is None else f"[{text(low, sign=sign)}, {text(high, sign=sign)}]"


class Stat:
    """A score as a function of sums over units that are summed by cluster."""

    def __init__(self, units, value, kind, most=None):
        order = {}
        for cluster, row in units:
            order[cluster] = order.get(cluster, 0) + np.asarray(row, float)
        self.names, self.rows = list(order), np.array(list(order.values()))
        self.of, self.kind, self.most = value, kind, most

    @property
    def value(self):
        return float(self.of(self.rows.sum(0)))


def accuracy(scores, clusters):
    """Percent; the questions in the order of their names."""
    units = [(clusters[name], (scores[name], 1.0)) for name in sorted(scores)]
    return Stat(units, lambda sums: 100 * sums[..., 0] / sums[..., 1], "proportion", 100.0)


def slopes(value, sums):
    """Derivatives of a score by its sums [..., terms]."""
    found = np.zeros_like(sums)
    for place in range(sums.shape[-1]):
        step = 1e-6 * (1 + abs(sums[..., place]))
        up, down = sums.copy(), sums.copy()
        up[..., place] += step
        down[..., place] -= step
        found[..., place] = (value(up) - value(down)) / (2 * step)
    return found


def freedom(squares, fourths, clusters):
    """Clusters that decide the spread, and Satterthwaite's degrees of freedom."""
    few = squares**2 / fourths if fourths > 0 else 0
    return few, 2 / max(1 / few - 1 / clusters, 1e-12) if few else 0


def interval(stat):
    """(value, low, high, name of the interval or why there is none)."""
    rows, mean, n = stat.rows, stat.value, len(stat.rows)
    share = rows @ slopes(stat.of, rows.sum(0))
    share = share - share.mean()
    squares = (share**2).sum()
    if math.sqrt(squares) <= 1e-7 * max(1, abs(mean)):
        return mean, None, None, "no spread"
    if n < FEWEST:
        return mean, None, None, "few clusters"
    few, nu = freedom(squares, (share**4).sum(), n)
    if few < DECIDING:
        return mean, None, None, "few decide"
    if stat.kind == "proportion" and (rows[:, 1] == 1).all() and np.isin(rows[:, 0], (0, 1)).all():
        right = rows[:, 0].sum()
        ends = (100 * float(stats.beta.ppf(q, right + 0.5, n - right + 0.5)) for q in (0.025, 0.975))
        return mean, *ends, "Jeffreys"
    half = float(stats.t.ppf(0.975, nu)) * math.sqrt(squares * n / (n - 1))
    if stat.most is None:
        return mean, mean - half, mean + half, "Student"
    # Wilson: the ends e with (p - e)^2 = z^2 e (1 - e) / m, where z^2 p (1 - p) / m is the half width squared.
    p = mean / stat.most
    bend = (half / stat.most) ** 2 / (p * (1 - p))
    centre = (p + bend / 2) / (1 + bend)
    reach = math.sqrt(bend * p * (1 - p) + bend**2 / 4) / (1 + bend)
    return mean, stat.most * (centre - reach), stat.most * (centre + reach), "Wilson"


def compare(a, b):
    """(a - b, low, high, p): the studentised paired permutation test; every exchange is made with the rows."""
    assert a.names == b.names
    n = len(a.rows)

    def ratios(signs):
        """Difference, its standard error, and their ratio: infinite without spread, 0 without a difference."""
        stay = signs[:, :, None] > 0
        first, second = np.where(stay, a.rows, b.rows), np.where(stay, b.rows, a.rows)
        one, other = first.sum(1), second.sum(1)
        share = np.einsum("dct,dt->dc", first, slopes(a.of, one)) - np.einsum("dct,dt->dc", second, slopes(b.of, other))
        share = share - share.mean(1, keepdims=True)
        values = np.array([a.of(one), b.of(other)])
        gap, error = values[0] - values[1], np.sqrt((share**2).sum(1) * n / max(1, n - 1))
        error[error <= 1e-7 * np.maximum(1, abs(values).max(0))] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            return gap, error, np.where(abs(gap) <= 1e-9, 0.0, np.where(error > 0, abs(gap) / error, np.inf))

    gap, error, observed = (float(part[0]) for part in ratios(np.ones((1, n))))
    share = a.rows @ slopes(a.of, a.rows.sum(0)) - b.rows @ slopes(b.of, b.rows.sum(0))
    share = share - share.mean()
    if n < 2:
        return gap, None, None, 1.0
    if 2**n <= DRAWS:
        known = ratios(np.array(list(itertools.product((1.0, -1.0), repeat=n))))[2]
    else:
        known = np.append(ratios(np.random.default_rng(0).choice((-1.0, 1.0), (DRAWS, n)))[2], observed)
    known = np.where(np.isclose(known, observed, rtol=1e-6, atol=1e-6), observed, known)
    p = float((known >= observed).mean())
    largest = float(np.sort(known)[math.ceil(round(0.95 * len(known), 6)) - 1])
    above = known[(known > largest * (1 + 1e-6) + 1e-6) & np.isfinite(known)]
    differing = int((a.rows != b.rows).any(1).sum())
    critical = max(largest, float(stats.t.ppf(0.975, max(1, differing - 1))))
    critical = (largest + float(above.min())) / 2 if above.size else critical
    if error == 0 or n < FEWEST or freedom((share**2).sum(), (share**4).sum(), n)[0] < DECIDING:
        return gap, None, None, p
    return gap, round(gap - critical * error, 9) + 0.0, round(gap + critical * error, 9) + 0.0, p


def holm(values):
    order, found, highest = sorted(range(len(values)), key=values.__getitem__), [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        found[place] = highest
    return found


def kinds(method, full):
    """Clusters with equal rows are one kind: (rows of the method, rows of full, how many)."""
    rows, counts = np.unique(np.concatenate([method.rows, full.rows], 1), axis=0, return_counts=True)
    terms = method.rows.shape[1]
    return rows[:, :terms], rows[:, terms:], counts.astype(float)


def relative_mean(pairs):
    """(mean, low, high) of 100 x method / full over benchmarks: name -> (method, full). Delta method."""
    parts, variance, ratios = [], 0.0, []
    for method, full in pairs.values():
        r, n = method.value / full.value, len(full.rows)
        of_method = method.rows @ slopes(method.of, method.rows.sum(0))
        of_full = full.rows @ slopes(full.of, full.rows.sum(0))
        share = (of_method - r * of_full) / full.value * 100 / len(pairs)
        share = share - share.mean()
        ratios.append(100 * r)
        parts.append(share)
        variance += (share**2).sum() * n / (n - 1)
    mean, share = float(np.mean(ratios)), np.concatenate(parts)
    few, nu = freedom((share**2).sum(), (share**4).sum(), len(share))
    if min(len(full.rows) for _, full in pairs.values()) < FEWEST or few < DECIDING:
        return mean, None, None
    half = float(stats.t.ppf(0.975, nu)) * math.sqrt(variance)
    return mean, mean - half, mean + half


def p_of_share(method, full, share=0.99):
    """p of "the method has at most `share` of full": draws from the nearest distribution in which it has just that."""
    m, f, counts = kinds(method, full)
    n = counts.sum()

    def gap(weights, m, f):
        return method.of(weights @ m) - share * full.of(weights @ f)

    def influence(m, f, counts):
        found = m @ slopes(method.of, counts @ m) - share * (f @ slopes(full.of, counts @ f))
        return found - counts @ found / counts.sum()

    moved = influence(m, f, counts)
    few = freedom(counts @ moved**2, counts @ moved**4, n)[0] < DECIDING
    if method.kind == "proportion":  # one more cluster, twice as bad as the worst
        asked, most = float(counts @ f[:, 1]) / n, float((f[:, 0] - m[:, 0]).max())
        lost = min(asked, 2 * most) if most > 0 and not few else asked
        more = np.array([asked - lost, asked]), np.array([asked, asked])
    else:
        of_method, of_full = m @ slopes(method.of, counts @ m), f @ slopes(full.of, counts @ f)
        worst = int(np.argmin(of_method - of_full))
        twice = of_method[worst] < of_full[worst] and not few
        more = (2 * m[worst], 2 * f[worst]) if twice else (m[np.argmin(of_method)], f[np.argmax(of_full)])
    wide_m, wide_f, wide = np.vstack([m, more[0]]), np.vstack([f, more[1]]), np.append(counts, 1.0)
    moved = influence(wide_m, wide_f, wide)
    spread = math.sqrt(wide @ moved**2 / wide.sum())
    if spread <= 0:
        return 1.0

    def weights(tilt):
        logs = tilt * moved / spread
        found = wide * np.exp(logs - logs.max())
        return found / found.sum()

    def excess(tilt):
        return float(gap(wide.sum() * weights(tilt), wide_m, wide_f))

    start, tilt = excess(0.0), 0.0
    if abs(start) > 1e-9:
        end = -np.sign(start) / 64
        while excess(end) * start > 0:
            end *= 2
            if abs(end) > 1e4:
                return 1.0
        tilt = brentq(excess, 0.0, end)
    drawn = np.random.default_rng(0).multinomial(int(n), weights(tilt), DRAWS).astype(float)
    reached = int((gap(drawn, wide_m, wide_f) >= float(gap(counts, m, f)) - 1e-9).sum())
    return (1 + reached) / (1 + DRAWS)


def tokens_needed(full, by_budget):
    """The smallest budget that passes with all larger ones: "192", or "> 192"."""
    found = None
    for budget in sorted(by_budget, reverse=True):
        if p_of_share(by_budget[budget], full) > 0.05:
            break
        found = budget
    return f"> {max(by_budget)}" if found is None else str(found)
