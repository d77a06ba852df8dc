from __future__ import annotations

import pytest

from pipeline.config import Checkpointing, Tracking
from pipeline.sections import without_credentials


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://host:5000/path", "http://host:5000/path"),
        ("http://ann:secret@host:5000", "http://host:5000"),
        ("http://ann:sec/ret@host:5000/path", "http://host:5000/path"),
        ("https://host/x?token=secret&a=b", "https://host/x"),
        ("https://host/x?token=sec@ret", "https://..."),
        ("http://ann:sec?ret@host", "http://..."),
        ("s3://key:secret@bucket/folder", "s3://bucket/folder"),
        ("sqlite:////data/ann@work/mlflow.db", "sqlite:////data/ann@work/mlflow.db"),
        ("file:///data/a@b", "file:///data/a@b"),
        ("/data/ann@work/runs", "/data/ann@work/runs"),
    ],
)
def test_an_address_is_written_down_without_its_credentials_and_used_with_them(address, shown):
    assert without_credentials(address) == shown
    assert "sec" not in shown
    tracking, checkpoint = Tracking(uri=address), Checkpointing(folder=address)
    assert (tracking.uri, checkpoint.folder) == (address, address)
    assert tracking.model_dump(mode="json")["uri"] == shown
    assert checkpoint.model_dump(mode="json")["folder"] == shown
    assert Tracking.model_validate(tracking.model_dump()) == tracking
