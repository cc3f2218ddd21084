"""The wheel: what is in it, and that it works where the checkout is not."""

import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from environments import PACKAGES, ROOT, run

pytestmark = pytest.mark.slow
LOAD = """
import interventions, eval, train, vlm_jax
model, processor = vlm_jax.load("mini-qwen3-vl")
print(vlm_jax.__file__, interventions.__file__, eval.__file__, train.__file__, sep="\\n")
print(model.config.family, model.config.text.num_hidden_layers)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the checkout, so that nothing of an older build is mixed in."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "docs", "tests", "benchmarks", "tpu_scripts", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of a new environment with the wheel. It borrows the dependencies of this environment. An editable
    install of the checkout is not borrowed with them, because only the new environment's own .pth files are read."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def installed(python, folder, *arguments):
    """What the new environment's Python prints, run in another folder and without this process's variables."""
    return run(python, *arguments, cwd=folder, env={"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "HOME": str(folder)})


def test_holds_the_packages_and_nothing_else(wheel):
    """Every file of the four packages, embedded models and py.typed included; no test, document or script."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.is_file()}
    assert names == {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    for model in ("mini-qwen3-vl", "mini-gemma3", "mini-llava"):
        assert f"vlm_jax/mini/{model}/model.safetensors" in names


def test_embedded_model_loads(python, tmp_path):
    *files, last = installed(python, tmp_path, "-c", LOAD).splitlines()
    environment = python.parent.parent.resolve()
    assert len(files) == len(PACKAGES)
    assert [file for file in files if not Path(file).resolve().is_relative_to(environment)] == []
    assert last == "qwen3_vl 8"


def test_command_shows_its_help(python, tmp_path):
    assert "--placement" in installed(python, tmp_path, "-m", "train.lora", "--help")
