"""Other Pythons install the pinned packages, from 3.12 on a newer jax, and the library, and trace the same numbers."""

import json
import sys

import numpy as np
import pytest
from environments import ROOT, environment, install_library, interpreter, run

pytestmark = pytest.mark.peers

VERSIONS = ("3.11", "3.12", "3.13")
TRACE = ("-m", "interventions.trace", "--task", "mini-okvqa", "--limit", "4", "--trace-batch", "4")


@pytest.mark.parametrize("version", VERSIONS)
def test_another_python_traces_the_same_numbers(version, tmp_path):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here: name one in PYTHON{version.replace('.', '_')}")
    other = environment(tmp_path / "environment", "-r", ROOT / "requirements.lock", python=python)
    install_library(other, tmp_path / "source")
    ratios = {}
    for name, command in {"this": sys.executable, "other": other}.items():
        run(command, *TRACE, "--out", tmp_path / name, cwd=ROOT if name == "this" else tmp_path)
        ratios[name] = np.array(json.loads((tmp_path / name / "summary.json").read_text())["rr"], float)
    assert np.abs(ratios["this"]).max() > 0.01
    np.testing.assert_allclose(ratios["other"], ratios["this"], atol=1e-5)  # another jax from Python 3.12 on
