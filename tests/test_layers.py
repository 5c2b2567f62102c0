"""The shape of the code: who may import whom, how long things are, and what must not be in the product."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("methods", "orchestrator", "cluster", "configs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
TEXTS = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in {".py", ".yaml", ".md", ".sh"})  # fmt: skip

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
RAY = {
    *("orchestrator/ray_tune.py", "orchestrator/ray_train.py", "orchestrator/group_failures.py"),
    *("orchestrator/ray_search.py", "orchestrator/ray_cluster.py"),
    *("orchestrator/ray_nodes.py", "orchestrator/ray_preflight.py", "orchestrator/ray_reservations.py"),
    *("orchestrator/submit.py", "orchestrator/submit_jobs.py"),
}
MLFLOW = {"orchestrator/tracking.py"}
OPTUNA = {"orchestrator/search.py"}
PURE = (
    *("plan", "placement", "space", "keys", "spec", "chain", "reader", "settings", "search", "dispatch"),
    *("references", "data_section", "cost", "budget", "statistics", "redact", "portable"),
    *("preflight_judge", "controls", "retry", "capacity", "packing"),
    *("trial_queue", "tally"),
    *("signals_plan", "signals_codec", "signals_form"),
)
OUTSIDE = {"ray", "mlflow", "fsspec", "s3fs", "boto3", "requests", "urllib", "socket", "subprocess", "shutil", "tempfile", "os", "pathlib", "io", "time"}  # fmt: skip
IMPURE = {
    f"orchestrator.{name}"
    for name in ("store", "lease", "checkpoint", "filesystem", "filesystem_local", "filesystem_remote", "facts", "stage", "trial", "sweep", "tracking", "mirror", "journal", "ray_tune", "ray_train", "ray_search", "ray_cluster", "micro_batch", "api", "cli", "account", "stopping", "signals", "signals_shelf", "signals_recording", "signals_probe", "stage_pack", "trial_pack", "pack_board", "pictures", "report_pictures", "prediction", "cli_predict")
}  # fmt: skip
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLE_ALLOWED = {"methods/models/weights.py", "methods/grounding/refer_pickle.py"}
"""Catches ``pickle.UnpicklingError``, which ``torch.load(weights_only=True)`` raises; an unpickler that refuses every name."""


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST) -> Iterator[str]:
    """Modules imported anywhere below ``node``, except for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child)


def packages_of(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(tree(path))}


def loaded_by(module: str) -> set[str]:
    """Our own modules that ``module`` loads, directly or through others."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        todo += [other for other in imports(tree(path)) if other.startswith("orchestrator.")]
    return seen - {module}


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 60
    assert "orchestrator/plan.py" in NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("methods/")])
def test_methods_know_nothing_of_sweeps(name: str) -> None:
    assert not packages_of(ROOT / name) & {"orchestrator", "cluster", "ray", "mlflow", "optuna", "fsspec"}


@pytest.mark.parametrize(("package", "allowed"), [("ray", RAY), ("mlflow", MLFLOW), ("optuna", OPTUNA)])
def test_each_service_has_its_adapter(package: str, allowed: set[str]) -> None:
    users = {name for name in NAMES if package in packages_of(ROOT / name)}
    assert users <= allowed
    assert users


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_touch_no_files_and_no_network(module: str) -> None:
    path = ROOT / "orchestrator" / f"{module}.py"
    assert not packages_of(path) & OUTSIDE
    assert not loaded_by(f"orchestrator.{module}") & IMPURE
    calls = {node.func.id for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
    assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}


@pytest.mark.parametrize("name", NAMES)
def test_files_are_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("name", NAMES)
def test_functions_are_short(name: str) -> None:
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(tree(ROOT / name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        and _code_lines(node) > MAX_FUNCTION_LINES
    ]  # fmt: skip
    assert long == []


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, without its docstring and without the decorators above it."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("methods/", "orchestrator/"))])
def test_public_names_exist(name: str) -> None:
    if name in RAY:
        pytest.importorskip("ray")
    module = importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    public = getattr(module, "__all__", None)
    if name.startswith("orchestrator/"):
        assert public is not None
    assert [item for item in public or [] if not hasattr(module, item)] == []
    assert len(set(public or [])) == len(public or [])
    assert module.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_unpickled(name: str) -> None:
    used = packages_of(ROOT / name) & PICKLERS
    assert not used or name in PICKLE_ALLOWED
    source = tree(ROOT / name)
    loads = [
        node
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert all(any(ast.unparse(word) == "weights_only=True" for word in load.keywords) for load in loads)
    calls = {ast.unparse(node.func) for node in ast.walk(source) if isinstance(node, ast.Call)}
    assert not calls & {"pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "torch.save"}  # fmt: skip


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_place_of_this_machine_is_in_the_product(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for place in ("../shared", "/root/", "/home/"):
        assert place not in text


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("methods/", "orchestrator/"))])
def test_annotations_are_never_evaluated(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    has_code = any(
        not isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in tree(ROOT / name).body
    )
    assert not has_code or "from __future__ import annotations" in text


def test_two_test_files_never_share_a_name() -> None:
    names = [
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if path.name not in ("conftest.py", "__init__.py")
    ]
    assert sorted(names) == sorted(set(names))
