"""The house rules that a machine can check: layers, budgets, targets, words, lazy imports."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.cli import COMMANDS, PACKAGES

ROOT = Path(__file__).resolve().parents[1]
CODE_PACKAGES = tuple(name for name in PACKAGES if name != "conf")
ALLOWED = {
    "common": {"common"},
    "solvers": {"common", "solvers"},
    "train": {"common", "solvers", "train"},
    "compress": {"common", "solvers", "compress"},
    "serve": {"common", "solvers", "serve"},
}
LAZY = ("datasets", "wandb", "transformers", "tokenizers", "triton", "fastapi", "ray", "matplotlib")
# Lightning looks for installed distributions before it imports them: both must be hidden.
HIDE = """
import importlib, sys
from importlib import metadata
real = metadata.distribution
def distribution(name):
    if name in hidden:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.distribution = distribution
sys.modules.update(dict.fromkeys(hidden))
for name in modules:
    importlib.import_module(name)
"""
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_CONFIG_LINES = 400, 60, 70
TARGET_ROOTS = (*CODE_PACKAGES, "torch", "lightning", "hydra")

SOURCES = sorted(path for name in CODE_PACKAGES for path in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path) -> Iterator[str]:
    """Yield the top-level package of every absolute import, inside functions too."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_imports_point_down() -> None:
    """Oracle: the layer rule of the design, common <- solvers <- {train | compress | serve}."""
    for path in SOURCES:
        package = path.relative_to(ROOT).parts[0]
        assert set(_imports(path)) & set(CODE_PACKAGES) <= ALLOWED[package], _name(path)


def test_layer_rule_sees_a_violation(tmp_path: Path) -> None:
    """Oracle: a planted upward import inside a function."""
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from train.optim import Muon\n    return Muon\n")
    assert "train" in set(_imports(planted))


def test_files_and_functions_stay_in_budget() -> None:
    """Oracle: the hard limits of the design."""
    for path in SOURCES + TESTS:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES, _name(path)
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{path}: {node.name}: {lines} lines"


def test_config_files_stay_in_budget() -> None:
    """Oracle: a configuration file fits a screen."""
    for path in CONFIGS:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_CONFIG_LINES, _name(path)


def test_public_names_are_documented_and_annotated() -> None:
    """Oracle: the style rule; a leading underscore makes a name private."""
    for path in SOURCES:
        tree = _tree(path)
        assert ast.get_docstring(tree), _name(path)
        for node in _public(tree):
            assert ast.get_docstring(node), f"{path}: {node.name} lacks a docstring"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.returns is not None, f"{path}: {node.name} returns what?"
                for argument in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
                    is_self = argument.arg in ("self", "cls")
                    assert is_self or argument.annotation, f"{path}: {node.name}({argument.arg})"


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[Any]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            # The signatures of an overloaded function are documented by the function itself.
            if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
                continue
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def _targets(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def _resolve(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(_resolve(module), name)


def test_targets_exist_and_accept_their_keys() -> None:
    """Oracle: the signature of each ``_target_``."""
    for path in CONFIGS:
        for node in _targets(yaml.safe_load(path.read_text(encoding="utf-8"))):
            target = node["_target_"]
            assert target.partition(".")[0] in TARGET_ROOTS, _name(path)
            # Hydra takes its defaults list out before anything is built.
            keys = {str(key) for key in node if not str(key).startswith("_")} - {"defaults"}
            parameters = inspect.signature(_resolve(target)).parameters
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            assert open_ended or keys <= set(parameters), f"{path}: {keys - set(parameters)}"


def test_commands_and_stages_exist() -> None:
    """Oracle: import of each ``module:function``; each command has its configuration."""
    stages = yaml.safe_load((ROOT / "conf/pipeline.yaml").read_text())["pipeline"]["stages"]
    targets = [target for target, _ in COMMANDS.values()] + [stage["target"] for stage in stages]
    for target in targets:
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), target
    for command in COMMANDS:
        assert (ROOT / "conf" / f"{command}.yaml").is_file(), command


def test_forbidden_words_are_absent() -> None:
    """Oracle: no unfinished business and no machine's own paths in anything that is shipped."""
    words = ["TO" + "DO", "FIX" + "ME", "X" + "XX"]
    words += ["/" + folder + "/" for folder in ("work", "root", "home", "mnt")]
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(word)}" for word in words))
    names = ("*.md", "*.toml", "Makefile", ".pre-commit-config.yaml", ".ci/run")
    others = [path for name in names for path in ROOT.glob(name)]
    for path in SOURCES + TESTS + CONFIGS + others:
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{_name(path)}: {found}"


def test_sources_are_ascii() -> None:
    """Oracle: the style rule."""
    for path in SOURCES + TESTS + CONFIGS:
        assert path.read_bytes().isascii(), _name(path)


def test_triton_stays_in_the_kernels() -> None:
    """Oracle: only kernel modules know triton."""
    users = {_name(path) for path in SOURCES if "triton" in set(_imports(path))}
    assert all(name.startswith("serve/kernels/") for name in users)


def test_lightning_stays_in_training() -> None:
    """Oracle: importing Lightning takes longer than torch; only training may pay for it."""
    named = {_name(path) for path in SOURCES if "lightning" in set(_imports(path))}
    named = {name for name in named if not name.startswith("train/")}
    assert named <= {"common/metrics_logger.py", "common/tracking.py"}
    for path in SOURCES:
        for node in _tree(path).body:
            if isinstance(node, ast.ImportFrom) and not _name(path).startswith("train/"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                assert "common.metrics_logger" not in {node.module, *names}, _name(path)
                assert "common.tracking.build_loggers" not in names, _name(path)


def test_optional_dependencies_are_imported_in_functions() -> None:
    """Oracle: the statements outside functions; kernel modules are triton's own place."""
    for path in SOURCES:
        allowed = {"triton"} if _name(path).startswith("serve/kernels/") else set()
        found = {
            (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name)
            for node in _tree(path).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert {name.partition(".")[0] for name in found} & set(LAZY) <= allowed, _name(path)


def test_packages_import_without_optional_dependencies() -> None:
    """Oracle: a fresh interpreter in which the optional dependencies cannot be imported."""
    kernels = [path for path in SOURCES if "triton" in set(_imports(path))]
    modules = sorted({_module(path) for path in SOURCES if path not in kernels})
    program = f"hidden = {LAZY}\nmodules = {modules}\n{HIDE}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_tests_are_no_package() -> None:
    """Oracle: an ``__init__.py`` there would shadow the packages of the same names."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
