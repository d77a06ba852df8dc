from __future__ import annotations

import pytest

from data_prep import DataError
from pipeline.failures import as_event, training_error


def raised(outer: Exception, inner: Exception | None = None) -> Exception:
    """The outer error as it is caught, made of the inner one where there is one."""
    with pytest.raises(type(outer)) as caught:
        try:
            raise inner or outer
        except Exception as error:
            if inner is None:
                raise
            raise outer from error
    return caught.value


def test_an_explained_error_is_its_line_and_leaves_no_trace(tmp_path):
    description = as_event(raised(DataError("train.beton is missing\n(look again)")))
    error = training_error(description, tmp_path)
    assert str(error) == "train.beton is missing"
    assert list(tmp_path.iterdir()) == []


def test_a_line_made_of_a_system_error_says_it_all(tmp_path):
    made = raised(DataError("cannot read x: No such file"), FileNotFoundError(2, "No such file"))
    assert str(training_error(as_event(made), tmp_path)) == "cannot read x: No such file"
    assert list(tmp_path.iterdir()) == []


def test_an_explained_error_made_of_an_unforeseen_one_keeps_the_trace_of_both(tmp_path):
    made = raised(DataError("epoch 2, step 7: KeyError: 'label'"), KeyError("label"))
    error = training_error(as_event(made), tmp_path)
    assert str(error).startswith("training failed: epoch 2, step 7: KeyError: 'label'; the full")
    trace = (tmp_path / "error.txt").read_text()
    assert "KeyError: 'label'" in trace and "DataError: epoch 2, step 7" in trace
    assert "raise inner or outer" in trace


def test_an_unforeseen_error_is_its_innermost_cause_and_a_trace(tmp_path):
    made = raised(RuntimeError("a worker failed"), ZeroDivisionError("division by zero"))
    error = training_error(as_event(made), tmp_path)
    assert str(error).startswith("training failed: ZeroDivisionError: division by zero; the full")
    assert "RuntimeError: a worker failed" in (tmp_path / "error.txt").read_text()
