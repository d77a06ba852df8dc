"""What an evaluation found, for people: figures, classes, confusions."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from data_prep.raw.names import printable
from pipeline.use.evaluation import ModelEvaluation
from pipeline.use.model import UsableModel

#: Up to so many classes all are shown, else so many of the worst.
_ALL_CLASSES, _WORST_CLASSES = 20, 10

#: Up to so many classes the confusion matrix is shown, else so many of its largest counts.
_MATRIX_CLASSES, _CONFUSIONS = 12, 10

#: Letters of a class name above a column of the matrix.
_COLUMN_LETTERS = 6


def evaluation_tables(found: ModelEvaluation) -> Iterable[RenderableType]:
    """Figures first, then the classes, then what was taken for what."""
    yield _figures(found)
    yield _classes(found)
    if len(found.class_names) <= _MATRIX_CLASSES:
        yield _matrix(found)
    else:
        yield _confusions(found)


def _names(found: ModelEvaluation) -> list[str]:
    """The names of the classes, which may be those of folders or stand in a file of others."""
    return [printable(name) for name in found.class_names]


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first columns are text, and the others numbers."""
    table = Table(box=SIMPLE, title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        is_text = number < left
        table.add_column(
            column, justify="left" if is_text else "right", style="bold" if number == 0 else None
        )
    return table


def _figures(found: ModelEvaluation) -> Table:
    evaluation = found.evaluation
    low, high = evaluation.interval
    table = _table(f"{found.model.name} on {found.dataset}", "", "", left=2)
    table.show_header = False
    table.add_row("model", Text(_model(found.model)))
    table.add_row("images", f"{evaluation.images:,} of the test split")
    table.add_row("top-1", f"{evaluation.top1:.2f} % (95 % interval: {low:.2f} to {high:.2f} %)")
    if evaluation.top5 is not None:
        table.add_row("top-5", f"{evaluation.top5:.2f} %")
    table.add_row("loss", f"{evaluation.loss:.4f}")
    table.add_row("recorded", _recorded(found))
    if found.picture is not None:
        table.add_row("picture", Text(str(found.picture)))
    return table


def _model(model: UsableModel) -> str:
    """Which one, and what else it is called in the registry."""
    aliases = model.version.aliases if model.version is not None else ()
    return f"{model.origin} ({', '.join(aliases)})" if aliases else model.origin


def _recorded(found: ModelEvaluation) -> str:
    """The accuracy of the registration, and whether this is the same."""
    recorded = found.model.recorded
    if not recorded:
        return "nothing"
    text = f"{recorded['top1']:.2f} % of {recorded['images']:,} images"
    match found.equals_recorded:
        case None:
            return f"{text}, which were others"
        case True:
            return f"{text}: equal"
        case False:
            return f"{text}: not equal"


def _classes(found: ModelEvaluation) -> Table:
    """Each class, or the worst ones: how many of its images are right, and what the others are."""
    confusion, names = found.evaluation.confusion, _names(found)
    counts = confusion.sum(dim=1).tolist()
    correct = found.evaluation.per_class
    shown = [label for label in range(len(names)) if counts[label]]
    title = "classes"
    if len(names) > _ALL_CLASSES:
        shown = sorted(shown, key=lambda label: correct[label] or 0.0)[:_WORST_CLASSES]
        title = f"the {len(shown)} worst of {len(names):,} classes"
    table = _table(title, "class", "mostly taken for", "images", "correct", left=2)
    for label in shown:
        wrong = confusion[label].clone()
        wrong[label] = 0
        other = int(wrong.argmax())
        mistaken = f"{names[other]} ({int(wrong[other]):,})" if wrong[other] else ""
        share = correct[label]
        assert share is not None
        table.add_row(Text(names[label]), Text(mistaken), f"{counts[label]:,}", f"{share:.2f} %")
    return table


def _matrix(found: ModelEvaluation) -> Table:
    names = _names(found)
    columns = [name[:_COLUMN_LETTERS] for name in names]
    table = _table("true class, and what it was taken for", "", *columns)
    for name, row in zip(names, found.evaluation.confusion.tolist(), strict=True):
        table.add_row(Text(name), *[f"{count:,}" if count else "." for count in row])
    return table


def _confusions(found: ModelEvaluation) -> Table:
    """The largest counts beside the diagonal."""
    names = _names(found)
    counts = found.evaluation.confusion.clone()
    counts.fill_diagonal_(0)
    most, cells = counts.flatten().topk(min(_CONFUSIONS, counts.numel()))
    table = _table("most frequent confusions", "true class", "taken for", "images", left=2)
    for count, cell in zip(most.tolist(), cells.tolist(), strict=True):
        if count:
            true, taken = divmod(cell, len(names))
            table.add_row(Text(names[true]), Text(names[taken]), f"{count:,}")
    return table
