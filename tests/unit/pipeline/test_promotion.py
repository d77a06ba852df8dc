"""Who becomes champion: by a paired test, whatever else happens at the same time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pipeline.config import PipelineError
from pipeline.registry.promotion import consider, promote
from pipeline.stores import TrackingStore
from tests.unit.pipeline.made_versions import (
    NAME,
    add_version,
    answers,
    champion,
    watched,
)
from tests.unit.pipeline.stored import one_line

GOOD, BETTER, BEST = range(20, 60), range(20, 45), range(5)  # images that these get wrong


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / "versions" / str(number) for number in range(100))


def tags(store: TrackingStore, number: int) -> dict[str, str]:
    return dict(store.client.get_model_version(NAME, str(number)).tags)


def test_the_first_version_of_a_name_is_champion_at_once_and_that_is_logged(store, folders):
    number = add_version(store, next(folders), answers(GOOD))
    assert consider(store, NAME, number) == "champion is version 1, the first one"
    assert champion(store) == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", tags(store, 1)["champion.since"])
    assert tags(store, 1)["champion.from"] == "none: the first one"
    moved = store.client.get_registered_model(NAME).tags["champion.moved"]
    assert moved.endswith("to version 1 from none: the first one")


def test_a_significantly_better_version_takes_its_place(store, folders):
    for wrong in (GOOD, BEST):
        line = consider(store, NAME, add_version(store, next(folders), answers(wrong)))
    assert line == (
        "champion is version 2, was version 1: version 2 has 97.50 % against 80.00 %, "
        "significantly better (p < 0.001)"
    )
    assert champion(store) == 2


def test_one_that_is_better_by_chance_does_not(store, folders):
    for wrong in (range(20, 30), range(20, 28)):
        line = consider(store, NAME, add_version(store, next(folders), answers(wrong)))
    # Two images that only the new one gets right, none that only the old one does: 1/4.
    assert line == (
        "champion stays version 1: version 2 has 96.00 % against 95.00 %, not significantly "
        "better (p = 0.25)"
    )
    assert champion(store) == 1
    assert "champion.since" not in tags(store, 2)


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (None, "version 2 of digits_lenet5 was registered without its evaluation.safetensors"),
        (answers(BEST, data="00" * 32), "they were evaluated on other test images"),
        (replace(answers(BEST), labels=answers(BEST).predicted), "on other test images"),
    ],
)
def test_what_cannot_be_compared_does_not_become_champion_unless_it_is_forced(
    store, folders, second, why
):
    consider(store, NAME, add_version(store, next(folders), answers(GOOD)))
    line = consider(store, NAME, add_version(store, next(folders), second))
    assert line.startswith("champion stays version 1: version 2 cannot be compared with it: ")
    assert line.endswith(why)
    with pytest.raises(PipelineError, match="--force moves it all the same") as error:
        promote(store, NAME, False, "ada")
    one_line(error)
    assert promote(store, NAME, True, "ada") == (
        "champion is version 2, was version 1: forced by ada"
    )
    assert champion(store) == 2
    assert tags(store, 2)["champion.from"] == "version 1: forced by ada"


def test_damaged_predictions_are_told_and_change_nothing(store, folders, tmp_path):
    consider(store, NAME, add_version(store, next(folders), answers(GOOD)))
    number = add_version(store, next(folders), answers(BEST))
    file = tmp_path / "versions" / "1" / "evaluation.safetensors"
    file.write_bytes(file.read_bytes()[:-30])
    assert "evaluation.safetensors is damaged" in consider(store, NAME, number)
    assert champion(store) == 1


def test_promotion_on_demand_makes_the_same_test(store, folders):
    for wrong in (GOOD, BETTER):
        number = add_version(store, next(folders), answers(wrong))
    assert promote(store, f"{NAME}@1", False, "ada") == (
        "champion is version 1, the first one, asked for by ada"
    )
    assert promote(store, f"models:/{NAME}/2", False, "ada").endswith("; asked for by ada")
    assert champion(store) == number
    assert promote(store, NAME, False, "ada") == f"champion of {NAME} is version 2 already"
    with pytest.raises(
        PipelineError,
        match=r"stays version 2: version 1 has 80\.00 % against 87\.50 %, not .*p = 1\)",
    ):
        promote(store, f"{NAME}@1", False, "ada")


def long_ago(store: TrackingStore, number: int) -> None:
    """Let the version have become champion an hour earlier than it did."""
    since = datetime.fromisoformat(tags(store, number)["champion.since"]) - timedelta(hours=1)
    store.client.set_model_version_tag(NAME, str(number), "champion.since", since.isoformat())


def test_an_alias_that_somebody_has_moved_back_by_hand_stays_moved_back(store, folders):
    for wrong in (GOOD, BEST):
        consider(store, NAME, add_version(store, next(folders), answers(wrong)))
    long_ago(store, 2)
    store.client.set_registered_model_alias(NAME, "champion", "1")
    line = consider(store, NAME, add_version(store, next(folders), answers(BETTER)))
    assert line.startswith("champion is version 3, was version 1: ")
    assert champion(store) == 3, "not version 2, which is better but was taken back"


def test_after_the_alias_was_deleted_by_hand_the_next_version_is_the_first_one(store, folders):
    consider(store, NAME, add_version(store, next(folders), answers(BEST)))
    long_ago(store, 1)
    store.client.delete_registered_model_alias(NAME, "champion")
    line = consider(store, NAME, add_version(store, next(folders), answers(GOOD)))
    assert line == "champion is version 2, the first one"
    assert champion(store) == 2


def test_who_asks_for_a_version_after_deleting_the_alias_gets_that_version(store, folders):
    for wrong in (BEST, GOOD):
        consider(store, NAME, add_version(store, next(folders), answers(wrong)))
    store.client.delete_registered_model_alias(NAME, "champion")
    line = promote(store, f"{NAME}@2", False, "ada")
    assert line == "champion is version 2, the first one, asked for by ada"
    assert champion(store) == 2


def test_a_model_of_made_up_images_is_never_champion(store, folders):
    add_version(store, next(folders), answers(GOOD), synthetic="true")
    for force in (False, True):
        with pytest.raises(PipelineError, match="made-up images"):
            promote(store, NAME, force, "ada")
    assert champion(store) is None


def interrupted_before(store: TrackingStore, call: str, doing) -> TrackingStore:
    """The store as a process sees it that loses time before the first such call."""
    waiting = [doing]

    def before(name: str) -> None:
        if name == call and waiting:
            waiting.pop()()

    return watched(store, before)


@pytest.mark.parametrize(
    ("call", "slow"), [("set_model_version_tag", 0), ("set_registered_model_alias", 1)]
)
@pytest.mark.parametrize("wrong", [(BETTER, BEST), (BEST, BETTER)])
def test_two_runs_that_finish_at_once_leave_the_better_one(store, folders, call, wrong, slow):
    """However one of them is held up, it ends as if they had finished one after the other."""
    consider(store, NAME, add_version(store, next(folders), answers(GOOD)))
    numbers = [add_version(store, next(folders), answers(images)) for images in wrong]
    other = interrupted_before(store, call, lambda: consider(store, NAME, numbers[1 - slow]))
    consider(other, NAME, numbers[slow])
    assert champion(store) == numbers[wrong.index(BEST)]


def test_two_first_versions_that_finish_at_once_leave_the_better_one(store, folders):
    numbers = [add_version(store, next(folders), answers(images)) for images in (GOOD, BEST)]
    other = interrupted_before(
        store, "set_registered_model_alias", lambda: consider(store, NAME, numbers[1])
    )
    line = consider(other, NAME, numbers[0])
    assert champion(store) == numbers[1]
    assert line.startswith("champion is version 2, ")


class KilledError(BaseException):
    """In place of a kill: nothing in between catches it."""


@pytest.mark.parametrize("survived", [1, 3, 4])
def test_a_run_that_was_killed_in_between_ends_right_when_it_is_continued(store, folders, survived):
    consider(store, NAME, add_version(store, next(folders), answers(GOOD)))
    number = add_version(store, next(folders), answers(BEST))
    calls: list[str] = []

    def before(name: str) -> None:
        if len(calls) == survived:
            raise KilledError
        calls.append(name)

    with pytest.raises(KilledError):
        consider(watched(store, before), NAME, number)
    assert champion(store) == (number if "set_registered_model_alias" in calls else 1)
    consider(store, NAME, number)
    assert champion(store) == number
    assert tags(store, number)["champion.from"].startswith("version 1: version 2 has 97.50 %")
    moved = store.client.get_registered_model(NAME).tags["champion.moved"]
    assert "to version 2 from version 1" in moved
