"""What the import contracts in pyproject can't say about the house: empty packages, no dangerous calls, no torch in the HTTP process,
one name for one thing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [ROOT / name for name in ("service", "kernels", "bench", "training") if (ROOT / name).is_dir()]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
BANNED_IMPORTS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec", "__import__", "torch.load", "torch.hub.load", "numpy.load", "np.load", "os.system", "os.popen", "yaml.load"}
BANNED_NAMES = ("Manager", "Handler", "Helper", "Util", "Utils", "Base", "Impl", "Mixin")
# In the process that takes requests, and in the client that measures it: modules that are imported in full and must not bring torch.
HTTP_PACKAGES = ("service.api", "service.codec", "service.jobs", "service.bench")
HTTP_MODULES = ("service.engine.client", "service.catalog", "service.checkpoint", "service.cli", "service.settings", "service.__main__")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(paths: list[Path]) -> Iterator[tuple[Path, ast.Module]]:
    for path in paths:
        yield path, ast.parse(path.read_text(encoding="utf-8"), named(path))


def dotted(node: ast.expr) -> str:
    """The name that is called: eval, torch.load, a.b.c; "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of imported modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def loads_only_weights(node: ast.Call) -> bool:
    """torch.load can be told to build nothing but tensors and plain values."""
    safe = any(each.arg == "weights_only" and isinstance(each.value, ast.Constant) and each.value.value is True for each in node.keywords)
    return dotted(node.func) == "torch.load" and safe


def dangers(tree: ast.AST) -> Iterator[str]:
    yield from BANNED_IMPORTS & set(imported(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if dotted(node.func) in BANNED_CALLS and not loads_only_weights(node):
            yield dotted(node.func)
        for keyword in node.keywords:
            is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            if is_true and keyword.arg in ("shell", "trust_remote_code", "allow_pickle"):
                yield f"{keyword.arg}=True"


def test_package_files_are_empty() -> None:
    full = [named(path) for path in SOURCES if path.name == "__init__.py" and path.stat().st_size]
    assert full == []


def test_nothing_unpickles_or_runs_text() -> None:
    found = [(named(path), danger) for path, tree in parsed(SOURCES) for danger in dangers(tree)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "exec(x)",
        "import torch\ntorch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=safe)",
        "torch.hub.load(x, weights_only=True)",
        "run(x, shell=True)",
        "np.load(x, allow_pickle=True)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_search_for_dangers_finds_them(code: str) -> None:
    assert list(dangers(ast.parse(code)))


def test_harmless_things_are_no_danger() -> None:
    assert not list(dangers(ast.parse("model.eval()\nre.compile(x)\nrun(x, shell=False)\njson.load(f)")))


def test_serving_code_has_no_assert() -> None:
    """python -O takes them out, so nothing may depend on one."""
    paths = [path for path in SOURCES if path.is_relative_to(ROOT / "service")]
    found = [f"{named(path)}:{node.lineno}" for path, tree in parsed(paths) for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert found == []


def test_every_module_says_what_it_is() -> None:
    assert [named(path) for path, tree in parsed(SOURCES) if path.name != "__init__.py" and not ast.get_docstring(tree)] == []


def test_no_class_is_named_after_nothing() -> None:
    classes = ((path, node.name) for path, tree in parsed(SOURCES) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [(named(path), name) for path, name in classes if name.endswith(BANNED_NAMES)] == []


def test_scheduling_needs_nothing_installed() -> None:
    allowed = {*sys.stdlib_module_names, "service"}
    paths = sorted((ROOT / "service" / "scheduling").glob("*.py"))
    assert paths
    found = {(named(path), name) for path, tree in parsed(paths) for name in imported(tree) if name not in allowed}
    assert found == set()


def modules_of(package: str) -> list[str]:
    folder = ROOT / package.replace(".", "/")
    return [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]


def test_the_http_process_never_loads_torch() -> None:
    """In a process of its own: this one has torch already."""
    modules = [module for package in HTTP_PACKAGES for module in modules_of(package)]
    modules += [module for module in HTTP_MODULES if (ROOT / (module.replace(".", "/") + ".py")).is_file()]
    assert len(modules) > 4
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint({'torch', 'triton'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "set()"), result.stderr


def test_kernels_know_nothing_of_the_service() -> None:
    paths = sorted((ROOT / "kernels").rglob("*.py"))
    assert [named(path) for path, tree in parsed(paths) if "service" in set(imported(tree))] == []


def test_contracts_name_modules_that_exist() -> None:
    """The lists above, too: a module that was renamed would silently not be looked at."""
    for package in HTTP_PACKAGES:
        importlib.import_module(package)
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file()
