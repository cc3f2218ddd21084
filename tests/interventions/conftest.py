"""A case of every family that a file asks for."""

import pytest
from kind_cases import Case


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(family):
        if family not in made:
            made[family] = Case(family, tmp_path_factory.mktemp(family))
        return made[family]

    return case
