"""The house of DESIGN.md, section 4: a module imports only from rooms above it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tune_implicit

# From the top of the house down; the page of public names, which looks into every room, is not in it.
ROOMS = [
    "errors",
    "rng",
    "vectors",
    "solvers.base",
    "solvers.quasi_newton",
    "solvers.conjugate_gradient",
    "solvers.dense",
    "solvers.minres",
    "solvers.neumann",
    "solvers.spectrum",
    "solvers.fallback",
    "solvers",
    "settings",
    "inverse_hvp",
    "batches",
    "problem",
    "products",
    "guards",
    "hypergradient",
    "findings",
    "retraining",
    "derivatives",
    "effort",
    "inspection",
    "trainer",
    "evaluation",
    "rehearsal",
    "checkup",
    "trial",
    "results",
    "study",
    "adapters",
    "adapters.optuna_study",
    "adapters.ray_tune",
    "adapters.ray_tune.searcher",
    "adapters.ray_tune.trainable",
    "adapters.ray_tune.tuner",
    "ledger",
    "run",
    "report",
    "cli",
]
PAGE = "tune_implicit"
CORE = ROOMS[: ROOMS.index("trial") + 1]
ENGINES = {"ray", "optuna"}

ROOT = Path(tune_implicit.__file__).parent
PATHS = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
MODULES = {".".join(parts).removesuffix(".__init__"): path for parts, path in PATHS.items() if parts != ("__init__",)}


def imports(path: Path) -> Iterator[str]:
    """Yield what a module imports anywhere, its functions and type checking included: a name that may be a module's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: imports are absolute here."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(path: Path) -> set[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for name in imports(path):
        if name.split(".")[0] == PAGE:
            inside = name.removeprefix(PAGE).removeprefix(".")
            found.add(inside if inside in MODULES else inside.rpartition(".")[0] or PAGE)
    return found


def test_every_module_has_its_room() -> None:
    assert sorted(MODULES) == sorted(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rooms_above(module: str) -> None:
    above = ROOMS[: ROOMS.index(module)]
    assert rooms(MODULES[module]) <= set(above)


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_no_engine(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & ENGINES


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("adapters.")])
def test_no_engines_adapters_import_anothers(module: str) -> None:
    own = ".".join(module.split(".")[:2])
    others = {room for room in rooms(MODULES[module]) if room.startswith("adapters.") and not room.startswith(own)}
    assert not others
    if own == "adapters.optuna_study":
        assert "ray" not in {name.split(".")[0] for name in imports(MODULES[module])}


def test_importing_loads_no_engine() -> None:
    # Ray takes seconds to import; what needs no engine, `tune-implicit --help` among it, does not wait for it.
    modules = ", ".join(f"{PAGE}.{room}" for room in ("trial", "results", "report", "cli"))
    code = f"import sys, {PAGE}, {modules}; print(*{ENGINES} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there() -> None:
    assert sorted(tune_implicit.__all__) == tune_implicit.__all__
    for name in tune_implicit.__all__:
        assert name in dir(tune_implicit)
        assert getattr(tune_implicit, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Explicit'"):
        tune_implicit.Explicit  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_all_names_what_a_module_defines(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {target.id for n in tree.body if isinstance(n, ast.Assign) for target in n.targets}
    defined |= {alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    (public,) = [
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
    ] or [[]]
    assert set(public) <= defined
