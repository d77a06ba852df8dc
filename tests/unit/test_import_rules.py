"""Who may import whom: read from the source with `ast`, and seen in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUR_PACKAGES = {"run", "pipeline", "models", "data_prep", "tune", "infra"}
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in OUR_PACKAGES
    for path in [*ROOT.glob(f"{package}.py"), *ROOT.glob(f"{package}/**/*.py")]
)

# Which of our modules a package may import; a name stands for everything below it.
MAY_IMPORT = {
    "run": {"pipeline.cli"},
    "pipeline": {"pipeline", "models", "data_prep"},
    "models": {"models"},
    "data_prep": {"data_prep"},
    "tune": {"tune", "pipeline"},
    "infra": {"infra", "pipeline"},
}
# The command line starts a search or a job on demand.
MAY_IMPORT_IN_FUNCTIONS = {"pipeline/cli.py": {"tune", "infra"}}
# Which libraries a package may import; one that is not named here may import any.
LIBRARIES = {
    "run": set[str](),
    "models": {"torch", "torchvision", "numpy", "safetensors", "onnx", "onnxruntime", "onnxscript"},
    "data_prep": {
        *("torch", "torchvision", "numpy", "PIL", "cv2"),
        *("ffcv", "llvmlite", "numba", "scipy", "sklearn"),
    },
}
# The only files that may import a library.
HOMES = {
    "ray": (
        # The session, what runs in its controller, and the run as a whole; a worker's view of it.
        *("pipeline/workers/session.py", "pipeline/workers/group_observer.py"),
        *("pipeline/launch.py", "pipeline/context.py", "tune/*", "infra/*"),
    ),
    "mlflow": ("pipeline/stores.py", "pipeline/tracking.py", "pipeline/registry/*"),
    "onnx": ("models/exporting/*", "pipeline/use/benchmark.py"),
    "onnxruntime": ("models/exporting/*",),
    "ffcv": ("data_prep/reading/ffcv_reader.py",),
    "numba": ("data_prep/reading/ffcv_reader.py", "data_prep/reading/kernels.py"),
    "llvmlite": ("data_prep/reading/kernels.py",),
    "safetensors": ("pipeline/*", "models/packing/file.py"),
    "scipy": ("data_prep/raw/imagenet.py",),
    "sklearn": ("data_prep/raw/arrays.py",),
}
# Libraries that are imported inside functions, so that what does not need them works without.
LAZY = {"ffcv", "mlflow", "onnx", "onnxruntime", "onnxscript", "ray", "scipy", "sklearn"}
# Packages that are imported inside functions as a whole.
LAZY_PACKAGES = {"tune", "infra"}
# The only files that may import a module by a name that is not written there.
DYNAMIC = {
    "data_prep/__init__.py",
    "models/__init__.py",
    "models/registry.py",
    "pipeline/experiments/__init__.py",
}
# Builtins that could import without being seen here.
HIDING = {"exec", "eval", "__import__"}


@dataclass(frozen=True)
class Import:
    """One import of a module: `lazy` in a function, `checked` for type checkers only."""

    module: str
    line: int
    lazy: bool
    checked: bool


class ImportReader(ast.NodeVisitor):
    """Collects the imports of one file; relative ones are resolved against its package."""

    def __init__(self, path: str) -> None:
        self.package = Path(path).parent.parts
        self.found: list[Import] = []
        self.hidden: list[tuple[int, str]] = []
        self.dynamic: list[int] = []
        self.lazy = False
        self.checked = False

    def add(self, module: str, line: int) -> None:
        self.found.append(Import(module, line, self.lazy, self.checked))
        if module.split(".")[0] == "builtins":
            self.hidden.append((line, "builtins must not be imported"))

    def hide(self, name: str, line: int) -> None:
        self.hidden.append((line, f"{name} could import anything"))

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self.add(name.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        above = self.package[: len(self.package) - node.level + 1] if node.level else ()
        module = ".".join([*above, *([node.module] if node.module else [])])
        for name in node.names:
            self.add(f"{module}.{name.name}", node.lineno)
            if name.name == "import_module" and name.asname:
                self.hide("import_module under another name", node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Name(id="import_module") | ast.Attribute(attr="import_module"):
                self.add_call(node)
                for argument in (*node.args, *node.keywords):
                    self.visit(argument)
            case _:
                self.generic_visit(node)

    def add_call(self, node: ast.Call) -> None:
        modules = [*node.args[:1], *(word.value for word in node.keywords if word.arg == "name")]
        match modules:
            case [ast.Constant(value=str() as module)] if not module.startswith("."):
                self.add(module, node.lineno)
            case _:
                self.dynamic.append(node.lineno)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in HIDING | {"import_module"}:
            self.hide(node.id, node.lineno)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in ("import_module", "__import__"):
            self.hide(node.attr, node.lineno)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        # Decorators and default values are computed with the definition, not with the call.
        for part in (*node.decorator_list, node.args):
            self.visit(part)
        outside, self.lazy = self.lazy, True
        for statement in node.body:
            self.visit(statement)
        self.lazy = outside

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        is_type_checking = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        outside, self.checked = self.checked, self.checked or is_type_checking
        for statement in node.body:
            self.visit(statement)
        self.checked = outside
        for statement in node.orelse:
            self.visit(statement)


def is_below(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def problems_of(path: str, imported: Import) -> Iterator[str]:
    """Yield what is wrong with one import in the file at `path`."""
    package = Path(path).parts[0].removesuffix(".py")
    library = imported.module.split(".")[0]
    if library in OUR_PACKAGES:
        allowed = MAY_IMPORT[package]
        if imported.lazy:
            allowed = allowed | MAY_IMPORT_IN_FUNCTIONS.get(path, set())
        if not is_below(imported.module, allowed):
            yield f"{package} must not import {imported.module}"
        if path.startswith("models/backbones/") and is_below(imported.module, {"models.methods"}):
            yield "a backbone must not import methods"
        return
    if library in sys.stdlib_module_names:
        return
    if library not in LIBRARIES.get(package, {library}):
        yield f"{package} must not import {library}"
    if not any(fnmatch(path, home) for home in HOMES.get(library, ("*",))):
        yield f"only {', '.join(HOMES[library])} may import {library}"
    at_once = not (imported.lazy or imported.checked or package in LAZY_PACKAGES)
    if library in LAZY and at_once:
        yield f"{library} must be imported inside a function"


def problems(path: str, source: str) -> list[str]:
    """What breaks the rules in `source`, as lines `path:line: what`."""
    reader = ImportReader(path)
    reader.visit(ast.parse(source))
    found = [
        (imported.line, problem)
        for imported in reader.found
        for problem in problems_of(path, imported)
    ]
    found += reader.hidden
    if path not in DYNAMIC:
        found += [(line, "the imported module must be written out") for line in reader.dynamic]
    return [f"{path}:{line}: {problem}" for line, problem in found]


@pytest.mark.parametrize("path", SOURCES)
def test_source_keeps_the_import_rules(path: str) -> None:
    assert problems(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("models/layers.py", "import pipeline.config", "models must not import pipeline.config"),
        ("models/layers.py", "from data_prep import datasets", "models must not import data_prep"),
        ("models/layers.py", "def f():\n    import pandas", "models must not import pandas"),
        ("models/layers.py", "def f():\n    import safetensors", "may import safetensors"),
        ("models/backbones/vgg.py", "from ..methods import ternary", "must not import methods"),
        ("models/backbones/vgg.py", "import models.methods", "must not import methods"),
        ("data_prep/convert.py", "from pipeline import run", "data_prep must not import pipeline"),
        ("data_prep/convert.py", "import ray", "data_prep must not import ray"),
        ("data_prep/convert.py", "import ffcv.writer", "ffcv must be imported inside a function"),
        ("data_prep/convert.py", "class A:\n    import ffcv", "ffcv must be imported inside"),
        ("data_prep/augment.py", "def f():\n    import ffcv", "may import ffcv"),
        ("data_prep/loaders.py", "def f():\n    import sklearn", "may import sklearn"),
        ("pipeline/loop.py", "from ray import train", "may import ray"),
        ("pipeline/loop.py", "def f():\n    import mlflow.pytorch", "may import mlflow"),
        ("pipeline/loop.py", "import_module('mlflow')", "may import mlflow"),
        ("pipeline/loop.py", "importlib.import_module('ray.train')", "may import ray"),
        ("pipeline/loop.py", "import_module(name='ray')", "may import ray"),
        ("pipeline/loop.py", "import_module(package=None, name='ray')", "may import ray"),
        ("pipeline/loop.py", "from importlib import import_module as load", "another name"),
        ("pipeline/loop.py", "load = importlib.import_module", "import_module could import"),
        ("pipeline/loop.py", "list(map(import_module, ['ray']))", "import_module could import"),
        ("pipeline/loop.py", "import_module(NAME)", "module must be written out"),
        ("pipeline/loop.py", "import_module(f'{library}.train')", "module must be written out"),
        ("pipeline/loop.py", "import_module('.train', 'ray')", "module must be written out"),
        ("pipeline/loop.py", "import_module(*names)", "module must be written out"),
        ("pipeline/loop.py", "import_module(**names)", "module must be written out"),
        ("pipeline/loop.py", "def f():\n    exec('import ray')", "exec could import anything"),
        ("pipeline/loop.py", "eval('__import__(\"ray\")')", "eval could import anything"),
        ("pipeline/loop.py", "run = exec", "exec could import anything"),
        ("pipeline/loop.py", "__import__('ray')", "__import__ could import anything"),
        ("pipeline/loop.py", "from builtins import exec as run", "builtins must not be imported"),
        ("pipeline/launch.py", "import ray", "ray must be imported inside a function"),
        ("pipeline/context.py", "from ray import train", "ray must be imported inside a function"),
        ("pipeline/tracking.py", "import mlflow", "mlflow must be imported inside a function"),
        ("pipeline/launch.py", "def f(x=import_module('ray')): ...", "ray must be imported inside"),
        ("pipeline/launch.py", "if not TYPE_CHECKING:\n    import ray", "ray must be imported"),
        ("pipeline/launch.py", "if TYPE_CHECKING:\n    x\nelse:\n    import ray", "inside a func"),
        ("pipeline/cli.py", "import tune", "pipeline must not import tune"),
        ("pipeline/loop.py", "def f():\n    import tune", "pipeline must not import tune"),
        ("tune/search.py", "import models", "tune must not import models"),
        ("run.py", "import pipeline.launch", "run must not import pipeline.launch"),
        ("run.py", "import torch", "run must not import torch"),
    ],
)
def test_offending_import_is_found(path: str, source: str, expected: str) -> None:
    assert expected in "\n".join(problems(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("run.py", "import sys\nfrom pipeline.cli import main"),
        ("models/layers.py", "import math\nimport torch.nn as nn\nfrom . import quantizers"),
        ("models/methods/step.py", "from models.backbones import resnet"),
        ("models/packing/file.py", "def f():\n    from safetensors.torch import save"),
        ("data_prep/reading/ffcv_reader.py", "def f():\n    from ffcv.reader import Reader"),
        (
            "data_prep/reading/ffcv_reader.py",
            "if TYPE_CHECKING:\n    from ffcv.loader import Loader",
        ),
        ("pipeline/cli.py", "def search():\n    from tune import search"),
        ("data_prep/__init__.py", "from importlib import import_module\nimport_module(NAME)"),
        ("pipeline/launch.py", "def f():\n    import ray"),
        ("pipeline/launch.py", "def f():\n    importlib.import_module('ray')"),
        ("pipeline/context.py", "if TYPE_CHECKING:\n    from ray.actor import ActorHandle"),
        ("pipeline/tracking.py", "def f():\n    from mlflow import MlflowClient"),
        ("pipeline/evaluate.py", "model.eval()"),
        ("tune/search.py", "from ray import tune"),
    ],
)
def test_rightful_import_is_let_through(path: str, source: str) -> None:
    assert problems(path, source) == []


def test_command_line_starts_without_the_heavy_libraries() -> None:
    """`--help` and `--list` answer at once, and work where Ray, FFCV and MLflow are missing."""
    heavy = {"torch", "torchvision", "ray", "mlflow", "ffcv", "numba", "sklearn", "matplotlib"}
    program = "import sys, models, data_prep, pipeline, pipeline.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert heavy.intersection(loaded) == set()
