"""Rules about imports that import-linter cannot say: external packages, and what a bare import drags in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import omniloom

ROOT = Path(omniloom.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level_imports(tree: ast.Module) -> set[str]:
    return imports(ast.Module(body=[node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)],
                              type_ignores=[]))  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_distributed_is_used_only_where_ranks_are_known(path) -> None:
    part = path.relative_to(ROOT).parts[0]
    if part not in ("parallel", "checkpoint", "run"):
        used = {name for name in imports(ast.parse(path.read_text())) if name.startswith("torch.distributed")}
        assert not used, f"{path} imports {used}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_slow_packages_are_imported_only_at_use(path) -> None:
    slow = ("transformers", "datasets", "pydantic", "av", "soxr", "peft", "pyarrow", "jinja2")
    names = {name.split(".")[0] for name in top_level_imports(_without_type_checking(ast.parse(path.read_text())))}
    assert not names & set(slow), f"{path} imports {names & set(slow)} at its top"


def _without_type_checking(tree: ast.Module) -> ast.Module:
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return tree


def test_no_model_or_operator_imports_transformers() -> None:
    for path in [*(ROOT / "models").rglob("*.py"), *(ROOT / "ops").rglob("*.py"), *(ROOT / "parallel").rglob("*.py")]:
        used = {name for name in imports(ast.parse(path.read_text())) if name.split(".")[0] == "transformers"}
        assert not used, f"{path} imports {used}"


def test_the_training_core_runs_with_torch_numpy_and_safetensors_alone() -> None:
    code = (
        "import sys\n"
        "for name in ('transformers','pydantic','av','soxr','datasets','pyarrow','tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "import omniloom.run.opening, omniloom.parallel.step, omniloom.parallel.encoder_pool\n"
        "import omniloom.training.optimizer\n"
        "import omniloom.checkpoint.dcp, omniloom.data.collate, omniloom.families.registry\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_private_module_of_torch_is_imported_at_once(path: Path) -> None:
    """Another release may lack it, for layouts that have no use for it too."""
    found = {name for name in top_level_imports(ast.parse(path.read_text())) if name.split(".")[0] == "torch"}
    assert not {name for name in found if any(part.startswith("_") for part in name.split(".")[:-1])}


def test_no_class_is_longer_than_250_lines() -> None:
    classes = (
        node for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    )
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in classes}
    assert {name: length for name, length in lengths.items() if length > 250} == {}
