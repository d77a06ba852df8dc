from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest

from models.calls import Call, ModelError, bind, parse_call, parse_calls


def target(
    *,
    count: int = 1,
    rate: float = 0.5,
    word: str = "a",
    flag: bool = False,
    choice: Literal[1, 2, 4] = 1,
    form: Literal["imagenet", "cifar"] = "cifar",
    factors: tuple[float, ...] | None = None,
) -> None:
    """Stand for a backbone with one argument of every supported type."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lenet5", Call("lenet5", {})),
        (" lenet5 ( ) ", Call("lenet5", {})),
        ("ternary-x4", Call("ternary-x4", {})),
        (
            "t(a=1, b=-2.5, c=word, d='two words')",
            Call("t", {"a": 1, "b": -2.5, "c": "word", "d": "two words"}),
        ),
        (
            "t(a=true, b=False, c=none, d=(1, 2), e=[.5])",
            Call("t", {"a": True, "b": False, "c": None, "d": (1, 2), "e": (0.5,)}),
        ),
    ],
)
def test_one_call_is_read_with_all_its_values(text: str, expected: Call) -> None:
    assert parse_call(text) == expected


def test_plus_splits_calls_but_not_numbers_inside_parentheses() -> None:
    calls = parse_calls("sparse(rate=1e+3, kernel=(1, 2)) + ternary-x4(first_last=float)")
    assert calls == [
        Call("sparse", {"rate": 1000.0, "kernel": (1, 2)}),
        Call("ternary-x4", {"first_last": "float"}),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot read ''"),
        ("a+", "cannot read 'a\\+'"),
        ("a(", "cannot read 'a\\('"),
        ("a(1)", "written argument=value"),
        ("a(**b)", "written argument=value"),
        ("a(b=1)(b=2)", "cannot read"),
        ("a(b=1).c(b=2)", "cannot read"),
        ("a(b=1)[0](b=2)", "cannot read"),
        ("a(b=1, b=2)", "b is given twice"),
        ("a(b=c.d)", "cannot read 'c.d'"),
        ("a(b=__import__('os'))", "cannot read"),
        ("5a", "cannot read '5a'"),
        ("a(b=0110)", "put digits in quotes, '0110'"),
        ("a(b=(1, 010), c=.5)", "put digits in quotes, '010'"),
        ("a(b=1.05, c=)", "write NAME or NAME"),
    ],
)
def test_unreadable_text_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        parse_calls(text)
    assert "\n" not in str(caught.value)


def test_values_are_converted_to_the_types_of_the_signature() -> None:
    call = parse_call("t(count=3, rate=2, word=b, flag=true, choice=4, form=imagenet, factors=.5)")
    bound = bind(call, target)
    assert bound == {
        "count": 3,
        "rate": 2.0,
        "word": "b",
        "flag": True,
        "choice": 4,
        "form": "imagenet",
        "factors": (0.5,),
    }
    assert isinstance(bound["rate"], float)
    assert bind(parse_call("t(factors=none)"), target) == {"factors": None}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("t(count=1.0)", "count=1.0 is not valid; count is a whole number"),
        ("t(count=true)", "count=true is not valid; count is a whole number"),
        ("t(rate=1e999)", "rate is a number"),
        ("t(word=3)", "word is a word, or text in quotes"),
        ("t(flag=1)", "flag is true or false"),
        ("t(choice=3)", "choice is one of 1, 2, 4"),
        ("t(choice=true)", "choice is one of 1, 2, 4"),
        ("t(form=cifr)", "\\(did you mean 'cifar'\\?\\); form is one of imagenet, cifar"),
        ("t(factors=(.5, a))", "factors is a list, each entry a number or none"),
        ("t(cuont=3)", "no argument 'cuont' \\(did you mean 'count'\\?\\); it takes count, rate"),
    ],
)
def test_wrong_arguments_are_refused_with_what_would_be_right(text: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        bind(parse_call(text), target)


def test_reserved_arguments_are_neither_accepted_nor_suggested() -> None:
    with pytest.raises(ModelError, match="count follows from the data"):
        bind(parse_call("t(count=3)"), target, reserved=["count"])
    with pytest.raises(ModelError, match="no argument 'cuont'; it takes rate"):
        bind(parse_call("t(cuont=3)"), target, reserved=["count"])


def test_importing_models_and_reading_calls_needs_no_torch() -> None:
    code = "import models, models.calls, sys; models.ModelError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
