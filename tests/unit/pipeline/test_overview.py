"""Versions listed and compared, from a real registry, and how they are named."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from pipeline.config import Experiment, PipelineError, Recipe
from pipeline.registry.overview import compare, list_models
from pipeline.registry.promotion import consider
from pipeline.registry.versions import (
    Reference,
    fetch_packed,
    find_version,
    list_versions,
    parse_reference,
)
from pipeline.stores import NotRegisteredError
from tests.unit.pipeline.made_versions import NAME, add_version, answers
from tests.unit.pipeline.stored import one_line

TAGS = {
    "top1_interval": "91.000 96.000",
    "stored_bytes": "254786",
    "packed_bytes": "260001",
    "macs": "1000",
    "parameters": "1238602",
    "method": "ternary",
    "dataset": "digits",
    "data.fingerprint": "0123456789abcdef",
    "git_commit": "fedcba9876543210",
}


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / "versions" / str(number) for number in range(100))


def shown(table: Table, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "name", "wanted"),
    [
        ("models:/net@champion", "net", "champion"),
        ("models:/net@17", "net", "17"),  # MLflow lets an alias be a number
        ("models:/net/17", "net", 17),
        ("net@champion", "net", "champion"),
        ("net@17", "net", 17),
        ("net", "net", None),
        ("digits_vgg16(width=2)_ternary@candidate-seed0", "digits_vgg16(width=2)_ternary",
         "candidate-seed0"),
    ],
)  # fmt: skip
def test_a_version_is_named_in_full_or_in_short(text, name, wanted):
    assert parse_reference(text) == Reference(name, wanted)
    assert parse_reference(str(parse_reference(text))) == Reference(name, wanted)


def test_a_bare_name_means_the_champion_and_without_one_the_candidate(store, folders):
    for wrong in (range(5), range(20)):
        add_version(store, next(folders), answers(wrong))
    assert find_version(parse_reference(NAME), store).number == 2
    consider(store, NAME, 1)
    found = find_version(parse_reference(NAME), store)
    assert (found.number, found.aliases) == (1, ("champion",))


def test_a_name_with_neither_says_what_it_has(store, folders):
    add_version(store, next(folders), None)
    store.client.delete_registered_model_alias(NAME, "candidate")
    store.client.set_registered_model_alias(NAME, "synthetic", "1")
    with pytest.raises(NotRegisteredError, match=f"write {NAME}@synthetic$") as error:
        find_version(parse_reference(NAME), store)
    one_line(error)


def test_a_version_of_before_the_packed_files_says_so(store, folders, tmp_path):
    add_version(store, next(folders), None)
    version = find_version(parse_reference(NAME), store)
    with pytest.raises(PipelineError, match=r"without a packed .*register it anew") as error:
        fetch_packed(version, store, tmp_path)
    assert one_line(error).startswith(f"version 1 of {NAME}")


def test_the_list_has_every_version_the_newest_first_and_names_can_be_chosen(store, folders):
    for wrong in (range(5), range(20)):
        add_version(store, next(folders), answers(wrong), **TAGS)
    add_version(store, next(folders), None, name="mnist_lenet5")
    consider(store, NAME, 1)
    text = shown(list_models(store))
    rows = [line.split() for line in text.splitlines() if "lenet5" in line]
    assert [row[0] for row in rows] == [f"{NAME}@2", f"{NAME}@1", "mnist_lenet5@1"]
    assert "champion" in rows[1]
    assert "90.00 (91.00-96.00)" in text
    assert "254,786" in text
    narrow = shown(list_models(store), width=80).splitlines()
    assert [row.split() for row in narrow if "lenet5" in row] == rows
    assert "mnist" not in shown(list_models(store, "digits*"))
    with pytest.raises(PipelineError, match="whose name matches 'cifar"):
        list_models(store, "cifar*")


def test_more_versions_than_a_page_of_the_store_are_all_listed(store, folders):
    add_version(store, next(folders), None)
    pages = []

    class Client:
        """Of a server that gives a version at a time."""

        def __getattr__(self, name):
            return getattr(store.client, name)

        def search_model_versions(self, filter_string=None, page_token=None):
            pages.append(page_token)
            return store.client.search_model_versions(
                filter_string, max_results=1, page_token=page_token
            )

    add_version(store, next(folders), None)
    found = list_versions(replace(store, client=Client()))
    assert [version.number for version in found] == [2, 1]
    assert len(pages) == 2


def test_two_versions_stand_side_by_side_with_the_test_and_what_was_trained_otherwise(
    store, folders, tmp_path
):
    for number, (wrong, lr) in enumerate([(range(20, 60), 0.1), (range(5), 0.05)]):
        add_version(store, next(folders), answers(wrong), **TAGS)
        recipe = Recipe(lr=lr, nesterov=bool(number))
        experiment = Experiment(name=NAME, dataset="digits", backbone="lenet5", train=recipe)
        (tmp_path / "versions" / str(number) / "experiment.yaml").write_text(experiment.to_yaml())
    text = shown(compare(store, f"{NAME}@1", f"models:/{NAME}@candidate"))
    rows = {line[:22].strip(): line[22:].split() for line in text.splitlines() if line.strip()}
    assert rows["only this one right"] == ["5", "images", "40", "images"]
    assert rows["train.lr ="] == ["0.1", "0.05"]
    assert rows["train.nesterov ="] == ["false", "true"]
    assert "train.epochs =" not in rows
    assert "not significantly better (p = 1)" in text
    assert " significantly better (p < 0.001)" in text
    assert rows["stored bytes"] == ["254,786", "254,786"]


def test_versions_that_answered_to_other_images_are_compared_without_the_test(store, folders):
    add_version(store, next(folders), answers(range(5)))
    add_version(store, next(folders), answers(range(5), data="00" * 32))
    assert "not image by image: they were evaluated on other test images" in shown(
        compare(store, f"{NAME}@1", f"{NAME}@2")
    )
