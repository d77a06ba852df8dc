"""What a run says of its code, packages and machine, against git and the interpreter itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from pipeline import provenance
from pipeline.provenance import environment_tags

GIT_TAGS = {"mlflow.source.git.commit", "git.dirty"}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=ann", "-c", "user.email=ann@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def project_in(folder: Path) -> Path:
    """A copy of the file under test in a project of its own."""
    (folder / "pipeline").mkdir(parents=True)
    shutil.copy(provenance.__file__, folder / "pipeline")
    return folder


def commit_all(folder: Path) -> str:
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return git(folder, "rev-parse", "HEAD")


def tags_of(project: Path) -> dict[str, str]:
    """The tags as a run of the code in `project` gives them."""
    spec = importlib.util.spec_from_file_location("copied", project / "pipeline" / "provenance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tags: dict[str, str] = module.environment_tags()
    return tags


def test_the_environment_names_packages_and_machine() -> None:
    import mlflow
    import torch

    tags = environment_tags()
    assert tags["version.torch"] == torch.__version__.split("+")[0]
    assert tags["version.mlflow"] == mlflow.__version__
    assert tags["host"] == socket.gethostname()


def test_the_commit_is_named_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    project = project_in(tmp_path / "project")
    commit = commit_all(project)
    assert tags_of(project).items() >= {
        ("mlflow.source.git.commit", commit),
        ("git.dirty", "false"),
    }
    (project / "new.py").touch()
    assert tags_of(project)["git.dirty"] == "true"


def test_a_copy_inside_another_repository_does_not_claim_its_commit(tmp_path: Path) -> None:
    project = project_in(tmp_path / "other" / "project")
    commit_all(tmp_path / "other")
    assert tags_of(project).keys() & GIT_TAGS == set()


def test_outside_a_repository_no_commit_is_named(tmp_path: Path) -> None:
    assert tags_of(project_in(tmp_path / "project")).keys() & GIT_TAGS == set()


def test_where_git_cannot_compare_files_it_is_not_said_that_they_are_unchanged(
    tmp_path: Path,
) -> None:
    project = project_in(tmp_path / "project")
    commit = commit_all(project)
    (project / ".git" / "index").write_bytes(b"broken")
    tags = tags_of(project)
    assert tags["mlflow.source.git.commit"] == commit
    assert "git.dirty" not in tags


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user that has no name")
def test_a_user_without_a_name_is_given_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    os.setresuid(54321, 0, 0)
    try:
        assert environment_tags()["mlflow.user"] == "54321"
    finally:
        os.setresuid(0, 0, 0)
