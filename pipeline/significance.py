"""What counts of right answers say: the interval of an accuracy, and whether one model is better.

Exact or in closed form, from whole numbers alone.
"""

from __future__ import annotations

import math

#: Standard normal deviation that 97.5 % of all values stay below.
_Z = 1.959963984540054


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share that was seen in a sample, in percent.

    With p = hits / count and z = 1.96 its ends are (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) /
    (1 + z^2/n) (Wilson, JASA 1927). Unlike the normal approximation it keeps what it promises near
    0 and 100 %, where good classifiers are (Brown, Cai and DasGupta, Statistical Science 2001).

    Args:
        hits: images that were classified right, from 0 to ``count``.
        count: all images, at least one.

    Returns:
        Lower and upper end.
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} hits of {count} images")
    share, spread = hits / count, _Z**2 / count
    center = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (100 * (center + side) / (1 + spread) for side in (-half, half))
    # Rounding may leave the possible, or the share itself, by a last digit.
    return max(0.0, min(low, 100 * share)), min(100.0, max(high, 100 * share))


def mcnemar(wins: int, losses: int) -> float:
    """One-sided p value of the exact McNemar test: is a model better than another one?

    Of the images that just one of the two gets right, each is as likely a win as a loss if both
    are equally good. The p value is the probability of so many wins or more: the upper tail of a
    binomial distribution with probability 1/2 (McNemar, Psychometrika 1947; in its exact form as
    in Dietterich, Neural Computation 1998). Images that both or neither get right say nothing.

    Args:
        wins: images that only the first model gets right.
        losses: images that only the second one gets right.

    Returns:
        From 0 to 1; 1 where the models never differ.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"{wins} wins and {losses} losses")
    count = wins + losses
    ways = tail = math.comb(count, wins)
    for number in range(wins, count):  # of wins; from each coefficient follows the next one
        ways = ways * (count - number) // (number + 1)
        tail += ways
    return tail / 2**count
