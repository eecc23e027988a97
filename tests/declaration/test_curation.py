"""A declaration can hold what curation asks for, in YAML and in Dagster's own component files."""

import pytest
import yaml

from scalselect_assets.component import SelectionComponent
from scalselect_assets.declaration.curation import Decontamination, NearDuplicates
from scalselect_assets.declaration.selection import Selection

DECLARED = """
name: pool
source: /pool
store: /store
target_model: org/model
decontamination: {texts: /benchmarks, max_hamming: null, ngram: 10}
near_duplicates: {cosine: 0.99}
"""


def test_a_declaration_holds_both_in_either_way_of_reading_it() -> None:
    by_pydantic = Selection.model_validate(yaml.safe_load(DECLARED))
    by_dagster = SelectionComponent.resolve_from_yaml(DECLARED)
    for selection in (by_pydantic, by_dagster):
        assert selection.decontamination == Decontamination(texts="/benchmarks", max_hamming=None, ngram=10)
        assert selection.near_duplicates == NearDuplicates(cosine=0.99)
    written = yaml.safe_load(by_pydantic.to_yaml())["attributes"]
    assert Selection.model_validate(written) == by_pydantic


def test_a_declaration_needs_neither() -> None:
    selection = Selection(name="pool", source="/pool", store="/store", target_model="org/model")
    assert selection.decontamination is selection.near_duplicates is None


@pytest.mark.parametrize("wrong", ["decontamination: {}", "near_duplicates: {cosine: 2}"])
def test_a_declaration_that_makes_no_sense_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong.partition(":")[0]):
        Selection.model_validate(
            {**yaml.safe_load(DECLARED), **yaml.safe_load(wrong)},
        )
