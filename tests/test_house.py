"""The house: which wing may import which, and how large a room may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tune_implicit

PAGE = "tune_implicit"
# What each wing stands on.
WINGS = {
    "errors": set(),
    "hypergradients": {"errors"},
    "trials": {"errors", "hypergradients"},
    "checks": {"errors", "hypergradients", "trials"},
    "searches": {"errors", "hypergradients", "trials"},
    "cli": {"errors", "hypergradients", "trials", "checks", "searches"},
    PAGE: {"errors", "hypergradients", "trials", "checks", "searches", "cli"},
}
ENGINES = {"ray", "optuna"}

ROOT = Path(tune_implicit.__file__).parent
PATHS = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
MODULES = {".".join(parts).removesuffix("__init__").removesuffix(".") or PAGE: path for parts, path in PATHS.items()}
each_module = pytest.mark.parametrize("module", MODULES)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports(module: str) -> Iterator[str]:
    """Yield what a module imports anywhere, its functions and type checking included: a name that may be a module's."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute here."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for name in imports(module):
        if name.split(".")[0] == PAGE:
            inside = name.removeprefix(PAGE).removeprefix(".")
            found.add(inside if inside in MODULES else inside.rpartition(".")[0] or PAGE)
    return found


def wing(module: str) -> str:
    return module.split(".")[0]


# ---- imports


@each_module
def test_a_wing_imports_only_from_those_it_stands_on(module: str) -> None:
    assert {wing(room) for room in rooms(module)} <= WINGS[wing(module)] | {wing(module)}


def test_no_imports_run_in_a_circle() -> None:
    TopologicalSorter({module: rooms(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("hypergradients.solvers")])
def test_solvers_know_errors_and_arguments_alone(module: str) -> None:
    others = {room for room in rooms(module) if not room.startswith("hypergradients.solvers")}
    assert others <= {"errors", "hypergradients.arguments"}


@each_module
def test_engines_are_imported_where_they_are_run(module: str) -> None:
    imported = {name.split(".")[0] for name in imports(module)} & ENGINES
    if module.startswith("searches.engines.ray_tune"):
        return
    assert imported <= ({"optuna"} if wing(module) == "searches" else set())


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("searches.engines.")])
def test_no_engine_imports_another(module: str) -> None:
    engine = ".".join(module.split(".")[:3])
    others = {room for room in rooms(module) if room.startswith("searches.engines.") and not room.startswith(engine)}
    assert others <= {"searches.engines.base"}


def test_importing_loads_no_engine() -> None:
    # Ray takes seconds to import; what needs no engine, `tune-implicit --help` among it, does not wait for it.
    modules = ", ".join(
        f"{PAGE}.{room}" for room in ("trials.trial", "checks.check", "searches.results", "searches.report", "cli")
    )
    code = f"import sys, {PAGE}, {modules}; print(*{ENGINES} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == ""


# ---- names


def test_every_public_name_is_there() -> None:
    assert sorted(tune_implicit.__all__) == tune_implicit.__all__
    for name in tune_implicit.__all__:
        assert name in dir(tune_implicit)
        assert getattr(tune_implicit, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Explicit'"):
        tune_implicit.Explicit  # noqa: B018


def test_no_module_at_the_top_bears_a_public_name() -> None:
    """Once a submodule of that name is loaded, it takes the place of what ``__getattr__`` returns."""
    assert not {path.stem for path in ROOT.iterdir()} & set(tune_implicit.__all__)


@pytest.mark.parametrize(
    "module", [parts[:-1] for parts in PATHS if parts[-1] == "__init__" and parts != ("__init__",)]
)
def test_a_wing_itself_holds_no_names(module: tuple[str, ...]) -> None:
    (docstring,) = tree_of(".".join(module)).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {PAGE}))
def test_all_names_what_a_module_defines(module: str) -> None:
    body = tree_of(module).body
    assigned = {target.id: n.value for n in body if isinstance(n, ast.Assign) for target in n.targets}
    defined = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)} | set(assigned)
    defined |= {n.target.id for n in body if isinstance(n, ast.AnnAssign)}
    defined |= {alias.name for n in body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert "__all__" not in assigned or set(ast.literal_eval(assigned["__all__"])) <= defined


# ---- sizes


def lines_of(node: ast.FunctionDef | ast.ClassDef) -> int:
    """Return the lines of a definition, its docstring apart."""
    docstring = node.body[0] if ast.get_docstring(node) else None
    return node.end_lineno - node.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


@each_module
def test_a_room_can_be_overlooked(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 400
    nodes = list(ast.walk(tree_of(module)))
    assert all(lines_of(node) <= 60 for node in nodes if isinstance(node, ast.FunctionDef))
    assert all(lines_of(node) <= 250 for node in nodes if isinstance(node, ast.ClassDef))


def test_a_visitor_finds_the_wings_at_once() -> None:
    assert len([path for path in ROOT.iterdir() if path.name != "__pycache__"]) <= 9
