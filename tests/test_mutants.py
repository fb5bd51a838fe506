"""The mutants apply to the current code; running them takes a while and is done by hand: python tests/mutants.py."""

import mutants
import pytest
from conftest import ROOT


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_has_one_place_and_tests_that_exist(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old and mutant.fault
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


def test_there_are_thirty_with_names_of_their_own():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) == 30


def test_the_readme_lists_them():
    assert mutants.table(mutants.MUTANTS) in (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
