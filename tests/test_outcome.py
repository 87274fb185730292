"""What a recipe comes to: what is missing has its reason, and nothing is read twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RecipeMaker

from lorafit import outcome
from lorafit.errors import DataError, ModelError
from lorafit.facts import UnreachableError
from lorafit.outcome import Outcomes
from lorafit.recipe import Recipe, RecipeError
from lorafit.tree import differences, key_path, leaves


def test_all_is_known_of_a_recipe_whose_files_are_here(recipe: RecipeMaker) -> None:
    found = Outcomes().of(Recipe.load(recipe()), "run")
    assert found.unknown == []
    assert found.plan is not None
    assert found.plan == found.require_plan()
    assert found.rows
    assert found.steps
    assert found.peak
    assert (found.no_rows, found.no_steps, found.no_peak) == (None, None, None)


def test_without_the_model_the_rest_is_known(recipe: RecipeMaker) -> None:
    found = Outcomes().of(Recipe.load(recipe(model={"name_or_path": "nobody/has-this"})), "run")
    assert isinstance(found.no_model, UnreachableError)
    assert (found.facts, found.plan, found.peak) == (None, None, None)
    assert found.rows
    assert found.steps
    assert found.rows_per_step
    assert found.no_peak == str(found.no_model)
    with pytest.raises(ModelError):
        found.require_plan()


def test_what_the_model_cannot_carry_out_is_the_reason(recipe: RecipeMaker) -> None:
    found = Outcomes().of(Recipe.load(recipe(lora={"target_modules": ["nothing"]})), "run")
    assert found.plan is None
    assert found.refused is not None
    assert found.no_peak == found.refused
    for required in (found.require_plan, found.estimate):
        with pytest.raises(RecipeError):
            required()


def test_a_row_that_cannot_be_read_leaves_the_plan(recipe: RecipeMaker, rows: Path) -> None:
    with rows.open("a") as stream:
        stream.write("no row\n")
    found = Outcomes().of(Recipe.load(recipe()), "run", count_rows=True)
    assert found.plan is not None
    assert found.peak is not None
    assert found.rows is None
    assert found.no_rows is not None
    assert f"{rows}:" in found.no_rows
    with pytest.raises(DataError):
        found.require_plan()


def test_models_rows_and_estimates_are_looked_at_once(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("read_facts", "counted", "estimate"):
        original = getattr(outcome, name)
        monkeypatch.setattr(
            outcome, name, lambda *given, name=name, call=original: (seen.append(name), call(*given))[1]
        )
    outcomes = Outcomes()
    for seed in (1, 2, 3):
        found = outcomes.of(Recipe.load(recipe(training={"seed": seed})), "run")
        assert found.rows
        assert found.peak
    assert sorted(seen) == ["counted", "estimate", "read_facts"]


def test_nested_values_are_told_by_dotted_keys() -> None:
    value = {"a": {"b": [1, {"c": 2}], "d": []}, "e": None}
    assert dict(leaves(value)) == {("a", "b", 0): 1, ("a", "b", 1, "c"): 2, ("a", "d"): [], ("e",): None}
    assert ("a", "b") in dict(leaves(value, enters=lambda _: False))
    assert key_path("a.b.1.c") == ("a", "b", 1, "c")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": True}, [(("a",), 1, True)]),
        ({"a": [1, 2]}, {"a": [1, 3]}, [(("a", 1), 2, 3)]),
        ({"a": [1]}, {"a": [1, 2]}, [(("a",), [1], [1, 2])]),
        ({"a": {"b": 1}}, {"a": None, "c": 2}, [(("a",), {"b": 1}, None), (("c",), None, 2)]),
    ],
)
def test_differences_are_as_deep_as_both_go(before: object, after: object, expected: object) -> None:
    assert list(differences(before, after)) == expected
