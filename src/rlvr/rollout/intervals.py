"""95% confidence intervals of what an evaluation reports.

The uncertainty meant is that of the choice of examples: what would other examples of the same kind have given?
Attempts at one example are alike, so the example is the unit, never the attempt (Miller 2024, "Adding Error Bars to
Evals", arXiv:2411.00640, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sqrt, tan
from statistics import NormalDist

Interval = tuple[float, float]
"""Lower and upper bound."""

CONFIDENCE = 0.95
_QUANTILE = (1 + CONFIDENCE) / 2
_Z = NormalDist().inv_cdf(_QUANTILE)


def interval(clusters: Sequence[Sequence[float]]) -> Interval | None:
    """For the mean of all values: that of a share where every value is 0 or 1, else that of a mean.

    Args:
        clusters: the values of each example, at least one.

    Returns:
        None with fewer than two examples.
    """
    binary = all(value in (0, 1) for values in clusters for value in values)
    return share_interval(clusters) if binary else mean_interval(clusters)


def mean_interval(clusters: Sequence[Sequence[float]]) -> Interval | None:
    """mean ± t · SE, with the cluster-robust standard error and as many degrees of freedom as examples, less one.

    With G examples, n values and the mean m: SE² = G/(G-1) · Σ_g (Σ_i (x_gi - m))² / n² (Cameron and Miller 2015, "A
    Practitioner's Guide to Cluster-Robust Inference", sections II.B and VI.D). With one value an example this is
    Student's interval.
    """
    examples = len(clusters)
    if examples < 2:
        return None
    mean, variance = _mean_and_variance(clusters)
    half = t_quantile(_QUANTILE, examples - 1) * sqrt(variance * examples / (examples - 1))
    return mean - half, mean + half


def share_interval(clusters: Sequence[Sequence[float]], *, attempts: int | None = None) -> Interval | None:
    """Wilson's score interval for the mean of values within [0, 1], which stays in there and has a width at 0 and 1.

    With one attempt at each of n examples it is Wilson's (1927). Otherwise n is the effective number of attempts
    m(1-m) / SE², at most those that were made, times (z/t)² for its being an estimate (Korn and Graubard 1998,
    "Confidence intervals for proportions with small expected number of positive counts estimated from survey data";
    with Wilson's interval: Franco et al. 2019, doi:10.1093/jssam/smy019). Where all values are 0, or all 1, nothing
    says how alike attempts are: they count as one an example.

    Args:
        clusters: the values of each example.
        attempts: made in all, where that is not the number of values (pass@k).
    """
    examples = len(clusters)
    if examples < 2:
        return None
    mean, variance = _mean_and_variance(clusters)
    attempts = attempts or sum(map(len, clusters))
    if attempts == examples or mean in (0, 1):
        size = float(examples)
    else:
        size = min(mean * (1 - mean) / variance, attempts) if variance > 0 else float(attempts)
        size *= (_Z / t_quantile(_QUANTILE, examples - 1)) ** 2
    return _wilson(mean, size)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution, for a probability of at least 0.5 (error below 0.2% at 0.975).

    Closed forms for one and two degrees of freedom, else Fisher's expansion (Abramowitz and Stegun 1964, 26.7.5).
    """
    if freedom == 1:
        return tan(pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def _mean_and_variance(clusters: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean of all values, and its variance over draws of examples, uncorrected for their number."""
    count = sum(map(len, clusters))
    mean = sum(map(sum, clusters)) / count
    return mean, sum((sum(values) - len(values) * mean) ** 2 for values in clusters) / count**2


def _wilson(share: float, size: float) -> Interval:
    z2 = _Z**2 / size
    centre = (share + z2 / 2) / (1 + z2)
    half = sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)
