"""The part of the command line that uses trained networks: its options, and what they need.

This needs no torch; what an option asks for is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import PipelineError, nearest

#: What `--export` writes.
FORMATS = ("onnx", "onnx-int8", "packed", "pt2")

#: Each action, and the settings that act on it: keys, or groups that end in a dot.
_DATA = ("data.", "tracking.", "train.batch_size")
_ACTIONS = {
    "evaluate": _DATA,
    "predict": ("tracking.", "train.batch_size"),
    "export": _DATA,
    "benchmark": ("tracking.",),
    "models": ("tracking.",),
    "compare": ("tracking.",),
    "promote": ("tracking.",),
}

#: Actions with settings of their own beside those, which have no dot in their names.
_WITH_OWN = ("export", "benchmark")

#: Options that change an action, and which ones they go with.
_CHANGES = {
    "dataset": ("evaluate",),
    "to": ("export",),
    "top": ("predict",),
    "json": ("evaluate", "predict", "benchmark"),
    "force": ("promote",),
}


@dataclass(frozen=True)
class Request:
    """What is asked of a trained network.

    Attributes:
        action: name of the option that asks for it.
        settings: ``a.b=value`` words behind it.
        own: ``key=value`` words that only this action knows.
        words: the other words: images to predict, or the file to export to.
    """

    action: str
    options: argparse.Namespace
    settings: list[str]
    own: list[str]
    words: list[str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the group "use a model"."""
    use = parser.add_argument_group(
        "use a model",
        "MODEL is NAME, NAME@ALIAS, NAME@3 or models:/NAME@ALIAS of the registry, or a packed file",
    )
    use.add_argument("--models", nargs="?", const="*", metavar="GLOB", help="show the registry")
    use.add_argument("--evaluate", metavar="MODEL", help="accuracy on its test images")
    use.add_argument("--dataset", metavar="NAME", help="with --evaluate: another data set")
    use.add_argument("--predict", metavar="MODEL", help="classes of the images and folders named")
    use.add_argument("--top", type=int, metavar="N", help="with --predict: classes to name (5)")
    use.add_argument("--export", metavar="MODEL", help="write it to the file named")
    use.add_argument("--to", metavar="FORMAT", help=f"with --export: {', '.join(FORMATS)}")
    use.add_argument("--benchmark", metavar="MODEL", help="how fast it is here, and its float twin")
    use.add_argument("--compare", nargs=2, metavar="NAME", help="two versions side by side")
    use.add_argument("--promote", metavar="NAME", help="make a version (the candidate) champion")
    use.add_argument("--force", action="store_true", help="with --promote: in any case")
    with_json = ", ".join(f"--{action}" for action in _CHANGES["json"])
    use.add_argument("--json", action="store_true", help=f"with {with_json}: as JSON")


class ActionSettings(BaseModel):
    """What may be asked for beside the model, as ``key=value``: the fields of a subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, action: str, words: Sequence[str]) -> Self:
        """Settings from the command line.

        Raises:
            PipelineError: one line, for an unknown one, or a value that it cannot have.
        """
        values: dict[str, str] = dict(word.split("=", 1) for word in words)
        for key in values:
            if key not in cls.model_fields:
                hint = nearest(key, cls.model_fields)
                raise PipelineError(f"--{action} has no setting {key}{hint}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            key = str(problem["loc"][0])
            raise PipelineError(f"{key}={values[key]}: {problem['msg']}") from None


def read_request(options: argparse.Namespace) -> Request | None:
    """What is asked of a trained network; None where nothing is.

    Raises:
        PipelineError: for options that do not go together, and settings without effect.
    """
    actions = [name for name in _ACTIONS if getattr(options, name) is not None]
    changes = [name for name in _CHANGES if getattr(options, name) not in (None, False)]
    if not actions:
        if changes:
            wanted = " or ".join(f"--{action}" for action in _CHANGES[changes[0]])
            raise PipelineError(f"--{changes[0]} goes with {wanted}")
        return None
    action = actions[0]
    with_it = (action, "settings", *_CHANGES)
    together = [
        name
        for name, value in vars(options).items()
        if name not in with_it and value not in (None, False)
    ]
    if together:
        other = together[0].replace("_", "-")
        raise PipelineError(f"--{action} goes alone, not with --{other}")
    for name in changes:
        if action not in _CHANGES[name]:
            wanted = " or ".join(f"--{other}" for other in _CHANGES[name])
            raise PipelineError(f"--{name} goes with {wanted}, not with --{action}")
    request = _sorted_words(action, options)
    _check_words(request)
    _check_settings(request)
    return request


def _sorted_words(action: str, options: argparse.Namespace) -> Request:
    """The request with its words told apart; a file may have a ``=`` in its name."""
    request = Request(action, options, [], [], [])
    for word in options.settings:
        key, equals, _ = word.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key) or _is_there(word):
            request.words.append(word)
        elif action in _WITH_OWN and "." not in key:
            request.own.append(word)
        else:
            request.settings.append(word)
    return request


def _is_there(word: str) -> bool:
    """Whether a word is the path of something."""
    try:
        return Path(word).exists()
    except OSError:
        return False  # of a name that no file can have, or in a folder that is closed


def _check_words(request: Request) -> None:
    """Refuse words that are missing or too many."""
    action, options, words = request.action, request.options, request.words
    if action == "predict":
        if not words:
            raise PipelineError(
                "--predict MODEL needs images or folders: --predict digits_lenet5 digit.png"
            )
        if options.top is not None and options.top < 1:
            raise PipelineError(f"--top {options.top} must be 1 or more")
    elif action == "export":
        if options.to is None or len(words) != 1:
            raise PipelineError("write --export MODEL --to FORMAT FILE: --to onnx digits.onnx")
        if options.to not in FORMATS:
            raise PipelineError(f"unknown format {options.to!r}: valid are {', '.join(FORMATS)}")
    elif words:
        raise PipelineError(f"--{action} has no use for {words[0]!r}")


def _check_settings(request: Request) -> None:
    """Refuse settings that do not exist, or change nothing here."""
    from pipeline.settings import parse_overrides

    allowed = _ACTIONS[request.action]
    for key in parse_overrides(request.settings):
        if not key.startswith(allowed):
            groups = ", ".join(f"{name}*" if name[-1] == "." else name for name in allowed)
            raise PipelineError(f"{key} has no effect on --{request.action}, which takes {groups}")
