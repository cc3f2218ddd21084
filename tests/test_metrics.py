"""Exact match, by hand-made cases."""

import pytest

from eval.tables import table1
from vlm_jax.data.metrics import exact_match


@pytest.mark.parametrize(
    "prediction, answers, right",
    [
        ("harbor", ["harbor"], True),
        (" Harbor. ", ["harbor"], True),
        ("the  harbor", ["the harbor"], True),
        ("the harbor", ["harbor"], False),
        ("harbor", ["cave", "Harbor"], True),
        ("3.5", ["35"], False),
        ("MAP", ["map"], True),
        ("", ["map"], False),
    ],
)
def test_exact_match(prediction, answers, right):
    assert exact_match(prediction, answers) is right


def test_table1_averages_seeds_but_not_their_sampling_error():
    def scores(*values):
        return [{"accuracy": value, "stderr": 0.02} for value in values]

    rows = [
        {"condition": "Baseline", "parameters": None, "knowledge": scores(0.4), "perception": scores(0.5)},
        {
            "condition": "Random-2",
            "parameters": {"knowledge": 1000, "perception": 2000},
            "knowledge": scores(0.5, 0.7),
            "perception": scores(0.6, 0.6),
        },
    ]
    lines = table1(rows, ["knowledge", "perception"]).splitlines()
    assert lines[2] == "| Baseline | 0.400 ± 0.020 | 0.500 ± 0.020 | - |"
    assert lines[3] == "| Random-2 | 0.600 ± 0.020 | 0.600 ± 0.020 | 1,000 / 2,000 |"
