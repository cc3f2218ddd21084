"""A case of every family, made once a file."""

import pytest
from kind_cases import FAMILIES, Case


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(family):
        if family not in made:
            made[family] = Case(family, tmp_path_factory.mktemp(family))
        return made[family]

    return case


@pytest.fixture(params=FAMILIES)
def case(request, cases):
    return cases(request.param)
