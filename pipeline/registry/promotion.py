"""Which version of a model is its champion: the one to use, until a better one is proven.

A version becomes champion if it classifies more of the same test images right, by a paired test.
The alias `champion` is moved, and the move is logged in tags: on the version that became champion
`champion.since` (UTC) and `champion.from` (the version before, the figures, and who forced it), on
the registered model `champion.moved` (the last move). Whoever moves or deletes the alias by hand
has the last word: what counts is where it points.

Two runs may finish at once, and MLflow cannot move an alias on condition that nobody else has: both
would compare themselves with the same champion, and the last one to move the alias would win. So

1. a version that is to become champion first says so in its tags, and over which champion
   (`champion.over`), and only then moves the alias;
2. whoever has moved it reads who else has said so over the same champion, within minutes, and moves
   it to the one that they all agree on: of those versions, by number, each takes the place of the
   one before only if it is significantly better.

The last one to move the alias has read them all, so that it ends where a comparison one by one had
put it. A process that dies between its tags and the alias has moved nothing; its run, when
continued, asks again.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import PipelineError
from pipeline.registry.predictions import NotComparableError, compare
from pipeline.registry.versions import (
    CANDIDATE,
    CHAMPION,
    SYNTHETIC_TAG,
    Reference,
    Version,
    find_version,
    parse_reference,
    read_predictions,
    versions_of,
)
from pipeline.stores import NotRegisteredError, TrackingStore, store_errors

#: Largest p value at which one version counts as better than another.
SIGNIFICANCE = 0.05

_SINCE, _FROM, _OVER = "champion.since", "champion.from", "champion.over"
_MOVED = "champion.moved"

#: Seconds within which two may have become champion without knowing of each other. A claim of
#: before is history: since then somebody may have moved the alias back by hand.
_MEANWHILE = 300


@dataclass(frozen=True)
class _Verdict:
    """Whether a version is better than the champion, and the figures in words."""

    better: bool
    text: str


def consider(store: TrackingStore, name: str, number: int) -> str:
    """Make a version that has just been registered the champion if it is better.

    The first version of a name becomes champion at once. Called again, it ends the same.

    Returns:
        A line that says which version is champion, and why.

    Raises:
        PipelineError: the store is away.
    """
    version = find_version(Reference(name, number), store)
    champion = _champion(name, store)
    if champion is None:
        return _move(store, version, None, "the first one")
    if champion.number == number:  # also when the process before was killed in the middle
        return _settle(store, version)
    verdict = _judge(version, champion, store)
    if verdict.better:
        return _move(store, version, champion, verdict.text)
    return f"champion stays version {champion.number}: {verdict.text}"


def promote(store: TrackingStore, reference: str, force: bool, by: str) -> str:
    """Make a version the champion because somebody asks for it.

    Args:
        reference: that names it, see ``parse_reference``; a bare name means its candidate.
        force: move the alias although the version is not better, or cannot be compared.
        by: who asks.

    Returns:
        A line that says which version is champion, and why.

    Raises:
        PipelineError: there is no such version, it is not better, or it is of made-up images.
    """
    wanted = parse_reference(reference)
    if wanted.wanted is None:
        wanted = Reference(wanted.name, CANDIDATE)
    version = find_version(wanted, store)
    if version.tags.get(SYNTHETIC_TAG) == "true":
        raise PipelineError(f"{version} was trained on made-up images, so it cannot be champion")
    champion = _champion(version.name, store)
    if champion is None:
        return _move(store, version, None, f"the first one, asked for by {by}", final=True)
    if champion.number == version.number:
        return f"champion of {version.name} is version {version.number} already"
    if force:
        return _move(store, version, champion, f"forced by {by}", final=True)
    verdict = _judge(version, champion, store)
    if not verdict.better:
        raise PipelineError(
            f"champion of {version.name} stays version {champion.number}: {verdict.text}; "
            "--force moves it all the same"
        )
    return _move(store, version, champion, f"{verdict.text}; asked for by {by}")


def _champion(name: str, store: TrackingStore) -> Version | None:
    try:
        return find_version(Reference(name, CHAMPION), store)
    except NotRegisteredError:
        return None


def _judge(version: Version, champion: Version, store: TrackingStore) -> _Verdict:
    """Compare a version with the champion on the images that both were evaluated on."""
    try:
        mine, theirs = (read_predictions(each, store) for each in (version, champion))
        found = compare(mine, theirs)
    except NotComparableError as error:
        return _Verdict(False, f"version {version.number} cannot be compared with it: {error}")
    p = found.p_first
    better = p < SIGNIFICANCE
    figures = f"version {version.number} has {found.first:.2f} % against {found.second:.2f} %"
    how = "significantly better" if better else "not significantly better"
    return _Verdict(better, f"{figures}, {how} ({p_value(p)})")


def p_value(p: float) -> str:
    """A p value as it is usually written."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _move(
    store: TrackingStore, version: Version, champion: Version | None, why: str, final: bool = False
) -> str:
    """Log the move, make it, and see to it that others who moved the alias meanwhile agree.

    Args:
        final: somebody has decided it; nobody else is asked.
    """
    origin = "none" if champion is None else f"version {champion.number}"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    over = "" if final else _reign(champion)
    tags = {_SINCE: now, _FROM: f"{origin}: {why}", _OVER: over}
    with store_errors(f"cannot make {version} the champion in {store.uri}"):
        for key, value in tags.items():
            store.client.set_model_version_tag(version.name, str(version.number), key, value)
        store.client.set_registered_model_alias(version.name, CHAMPION, str(version.number))
    return _settle(store, version)


def _reign(champion: Version | None) -> str:
    """What says of a champion which one it is, and of how many times that it was one."""
    if champion is None:
        return "none"
    return f"{champion.number} since {champion.tags.get(_SINCE, 'ever')}"


def _settle(store: TrackingStore, version: Version) -> str:
    """Let the champion be the one that all agree on who became champion at once.

    Args:
        version: to which the alias has been moved.

    Returns:
        A line that says which version is champion, and why.
    """
    name, winner = version.name, version.number
    while True:
        everyone = {each.number: each for each in versions_of(name, store)}
        agreed = _agreed(everyone, version.number, store)
        if agreed == winner:
            break
        winner = agreed
        with store_errors(f"cannot make version {winner} of {name} the champion in {store.uri}"):
            store.client.set_registered_model_alias(name, CHAMPION, str(winner))
    tags = everyone[winner].tags
    why = tags.get(_FROM, "unknown")
    with store_errors(f"cannot log the champion of {name} in {store.uri}"):
        moved = f"{tags.get(_SINCE, 'ever')}: to version {winner} from {why}"
        store.client.set_registered_model_tag(name, _MOVED, moved)
    return f"champion is version {winner}, {_before(why)}"


def _agreed(everyone: Mapping[int, Version], number: int, store: TrackingStore) -> int:
    """The champion of all versions that became champion over the same one as this one did."""
    version = everyone[number]
    over = version.tags.get(_OVER)
    if not over:
        return number
    before = over.split(" ")[0]
    winner = next((each for each in everyone.values() if str(each.number) == before), None)
    for each in everyone.values():
        apart = abs(_became_champion(each) - _became_champion(version))
        if each is not version and (each.tags.get(_OVER) != over or not apart < _MEANWHILE):
            continue
        if winner is None or _judge(each, winner, store).better:
            winner = each
    return number if winner is None else winner.number


def _became_champion(version: Version) -> float:
    """When it did, or was about to, in seconds since 1970; minus infinity if it never was."""
    try:
        return datetime.datetime.fromisoformat(version.tags.get(_SINCE, "")).timestamp()
    except ValueError:
        return -math.inf


def _before(why: str) -> str:
    """What a version's tag says of the champion before it, to end a sentence."""
    return why.removeprefix("none: ") if why.startswith("none: ") else f"was {why}"
