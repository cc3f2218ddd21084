"""What may import what: the layers of the code point down only, and nobody but the tests needs torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax.families import FAMILIES

ROOT = Path(__file__).parent.parent
#: Package -> the packages of ours that it may import beside itself.
BELOW = {
    "vlm_jax": set(),
    "interventions": {"vlm_jax"},
    "eval": {"vlm_jax", "interventions"},
    "train": {"vlm_jax", "interventions", "eval"},
}
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in BELOW}
#: Files that a person runs: options and a short main. What others need lies beside them.
COMMANDS = {file for files in FILES.values() for file in files if file.name == "__main__.py"}
#: File or room -> what it must not reach, however many imports lie between.
FAR = {
    "vlm_jax/data": ("vlm_jax/model.py", "vlm_jax/nn"),
    "interventions/placement/rules.py": ("vlm_jax/checkpoints",),
    "interventions/placement/scores.py": ("interventions/trace/__main__.py", "interventions/figures"),
}


def imports(tree):
    """Top-level packages imported anywhere in a module, inside functions too; relative imports stay at home."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found |= {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=module, level=0):
                found.add(module.partition(".")[0])
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(module)), *_]
            ):
                if name in ("import_module", "__import__"):
                    found.add(module.partition(".")[0])
    return found


def family_comparisons(tree):
    """Lines that compare a family's name: with one of its names, or anything called ``family`` or ``model_type``."""

    def is_family(node):
        match node:
            case ast.Constant(value=str(value)):
                return value in FAMILIES
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=name)):
                return name in ("family", "model_type")
            case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=name), *_]):
                return name in ("family", "model_type")
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                return any(map(is_family, parts))
        return False

    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=left, comparators=others) if any(map(is_family, [left, *others])):
                found.append(node.lineno)
            case ast.Match(subject=subject) if is_family(subject):
                found.append(node.lineno)
    return found


def parse(file):
    return ast.parse(file.read_text(), str(file))


def module_files(name):
    """The file of a module of ours, as a list; empty for a module of somebody else."""
    path = ROOT / name.replace(".", "/")
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]


def imported_files(tree):
    """The files of ours that a module imports, inside functions too: for ``from a import b`` that of ``a.b`` where it
    is a module, else that of ``a``. (Python also runs the ``__init__`` of every package above; those import nothing
    but the public names.)"""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found.update(file for alias in names for file in module_files(alias.name))
            case ast.ImportFrom(module=module, level=0, names=names):
                for alias in names:
                    found.update(module_files(f"{module}.{alias.name}") or module_files(module))
    return found


def graph():
    return {file: imported_files(parse(file)) for files in FILES.values() for file in files}


def circles(edges):
    """The files that import themselves, directly or through others, and what each file reaches."""

    def reach(start):
        seen, todo = set(), list(edges[start])
        while todo:
            if (file := todo.pop()) not in seen:
                seen.add(file)
                todo += edges.get(file, ())
        return seen

    reached = {file: reach(file) for file in edges}
    return [file for file in edges if file in reached[file]], reached


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_down(package):
    assert FILES[package]
    forbidden = BELOW.keys() - BELOW[package] - {package}
    upward = {str(file.relative_to(ROOT)): imports(parse(file)) & forbidden for file in FILES[package]}
    assert not any(upward.values()), {file: names for file, names in upward.items() if names}


def test_no_files_import_each_other():
    found, _ = circles(graph())
    assert not found, [str(file.relative_to(ROOT)) for file in found]


def test_nothing_imports_a_command():
    importers = {str(file.relative_to(ROOT)) for file, imported in graph().items() if imported & COMMANDS}
    assert COMMANDS and not importers


@pytest.mark.parametrize("place", FAR)
def test_far_apart(place):
    """Libraries do not hang on commands, nor data on models."""
    _, reached = circles(graph())
    files = [file for file in reached if file == ROOT / place or ROOT / place in file.parents]
    assert files
    for file in files:
        for far in FAR[place]:
            assert (ROOT / far).exists()
            near = [f for f in reached[file] if f == ROOT / far or ROOT / far in f.parents]
            assert not near, f"{file.relative_to(ROOT)} imports {near[0].relative_to(ROOT)}"


def test_only_families_know_families():
    """Elsewhere a family is looked up in the registry, never compared. (Tasks have families too, in ``data``.)"""
    outside = [f for f in FILES["vlm_jax"] if not {"families", "data"} & set(f.relative_to(ROOT).parts)]
    assert {"model.py", "load.py", "prompts.py"} <= {file.name for file in outside}
    found = {str(file.relative_to(ROOT)): family_comparisons(parse(file)) for file in outside}
    assert not any(found.values()), {file: lines for file, lines in found.items() if lines}


def test_torch_is_imported_nowhere():
    packages = [file for files in FILES.values() for file in files]
    users = [
        str(file.relative_to(ROOT)) for file in packages if imports(parse(file)) & {"torch", "torchvision", "peft"}
    ]
    assert users == []


# The detectors must detect.


@pytest.mark.parametrize(
    "code, package",
    [
        ("import torch.nn as nn", "torch"),
        ("def f():\n    from train.loop import fit", "train"),
        ("import os, interventions.kinds", "interventions"),
        ("importlib.import_module('eval.tables')", "eval"),
    ],
)
def test_imports_are_found(code, package):
    assert package in imports(ast.parse(code))
    assert not imports(ast.parse("from . import torch\nfrom .train import x\ntorch = 1\nprint('eval')")) & {package}


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[0] == ["a", "b", "c"]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})[0] == []


@pytest.mark.parametrize(
    "code",
    [
        "config.family == 'anything'",
        "if 'qwen3_vl' != name: pass",
        "config['model_type'] in ('a', 'b')",
        "x = hf.get('model_type') == y",
        "kind in ['qwen3_vl']",
        "match config.family:\n    case 'a': pass",
    ],
)
def test_family_comparisons_are_found(code):
    assert family_comparisons(ast.parse(code)) == [1]
    assert not family_comparisons(ast.parse("FAMILIES[config.family].TABLE; family_of(hf.get('model_type'), where)"))


# In a process of its own, since this one has torch. The second part is what every run does before its first step.
WITHOUT_TORCH = """
import sys
from importlib.abc import MetaPathFinder


class NoTorch(MetaPathFinder):
    tried = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            self.tried.append(name)
            raise ModuleNotFoundError("No module named 'torch'", name="torch")


sys.meta_path.insert(0, NoTorch())
import interventions
import vlm_jax

assert not NoTorch.tried, "importing vlm_jax or interventions asks for torch"
sys.modules["torch"] = None  # looked for from here on, and not there

from pathlib import Path

from PIL import Image
from train.mini import write_qwen3_vl
from vlm_jax.checkpoints.sources import read_config
from vlm_jax.data import Example
from vlm_jax.families.qwen3_vl import load_processor
from vlm_jax.prompts import encode

folder = Path(sys.argv[1])
write_qwen3_vl(folder)
example = Example("a", (Image.new("RGB", (64, 48)),), "What is it?", ("red",))
batch = encode([example], load_processor(folder), read_config(folder))
assert batch.spans["image"].sum() > 0
print("torch" if sys.modules["torch"] is not None else "no torch")
"""


def test_works_without_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "no torch"


def test_packages_that_take_long_load_when_they_are_used():
    """Not with the library, whose import is what a user waits for first."""
    heavy = ["scipy.stats", "matplotlib", "orbax.checkpoint", "jax.experimental.pallas", "pandas", "transformers"]
    program = f"import sys, interventions, vlm_jax; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
