"""A case of every family, made once a session, because all tests of a family run one compiled program."""

import pytest
from kind_cases import FAMILIES, Case


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    made = {}

    def case(family):
        if family not in made:
            made[family] = Case(family, tmp_path_factory.mktemp(family))
        return made[family]

    case.made = made
    return case


@pytest.fixture(params=FAMILIES)
def case(request, cases):
    return cases(request.param)


@pytest.fixture(scope="module")
def qwen(cases):
    return cases("qwen3_vl")


@pytest.fixture(scope="module", autouse=True)
def one_program(cases):
    """All tests of a file run one program a family: layers, heads, tokens and strengths are values. (Between two files,
    ``forget_programs`` may have freed it.)"""
    before = {family: case.traced for family, case in cases.made.items()}
    yield
    for family, case in cases.made.items():
        assert case.traced - before.get(family, 0) <= 1, f"{family} was traced anew"
