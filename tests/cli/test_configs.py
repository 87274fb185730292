"""Every shipped recipe loads, fits the committed schema, and can be planned without a network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from lorafit.cli.schema import json_schema
from lorafit.facts import ModelFacts, known_models, layout
from lorafit.hardware import Hardware
from lorafit.memory import estimate, fits, setup_of
from lorafit.plan import make_plan
from lorafit.recipe import Recipe
from lorafit.recipe.yaml import read_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
METHODS = sorted((ROOT / "recipes").glob("*.yaml"))
A_GPU = Hardware("cuda", "a GPU", 80 << 30, (8, 0), True)


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@pytest.mark.parametrize("config", CONFIGS, ids=names(CONFIGS))
def test_a_config_loads_and_is_planned(config: Path) -> None:
    recipe = Recipe.load(config)
    name = recipe.model.name_or_path
    known = {key.rpartition("/")[2]: value for key, value in known_models().items()}
    values = known[name.rpartition("/")[2].lower()]
    facts = ModelFacts(name, "bundled", "the bundled configuration", values, tuple(layout(values)))
    plan = make_plan(recipe, facts, A_GPU, config.stem, read_data=False)
    assert plan.output_dir == f"runs/{config.stem}"
    assert 0 < plan.trainable_parameters < facts.parameters
    meant = re.search(r"GPU of (\d+) GB", config.read_text())
    assert fits(estimate(setup_of(plan, facts)), int(meant[1] if meant else 8) << 30) == "fits"


@pytest.mark.parametrize("path", CONFIGS + METHODS, ids=names(CONFIGS + METHODS))
def test_a_file_fits_the_schema_that_its_comment_points_to(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    marker = "# yaml-language-server: $schema="
    assert first.startswith(marker)
    schema = json.loads((path.parent / first.removeprefix(marker)).read_text())
    jsonschema.validate(read_yaml(path.read_text(), str(path)).plain(), schema)


@pytest.mark.parametrize("method", METHODS, ids=names(METHODS))
def test_a_method_recipe_completes_a_config(method: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"extends: {method}\nmodel: {{name_or_path: a/b}}\ndataset: {{train: [{{path: rows.jsonl}}]}}\n")
    assert Recipe.load(config).training.learning_rate > 0


class TestSchema:
    def test_it_is_valid_itself(self) -> None:
        jsonschema.Draft202012Validator.check_schema(json_schema())

    def test_it_is_closed_at_every_depth(self) -> None:
        schema = json_schema()
        sections = [schema, *(part for part in schema["$defs"].values() if part.get("type") == "object")]
        assert all(section["additionalProperties"] is False for section in sections)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"lora": {"lora_alpah": 1}},
            {"training": {"learning_rate": "fast"}},
            {"dataset": {"train": [{"pth": "x"}]}},
            {"model": {"dtype": "float31"}},
        ],
    )
    def test_an_editor_sees_mistakes(self, wrong: dict) -> None:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, json_schema())

    def test_an_editor_accepts_references_to_the_environment(self) -> None:
        jsonschema.validate({"training": {"learning_rate": "${LR:-1e-4}"}}, json_schema())

    def test_every_field_is_described(self) -> None:
        for section in json_schema()["$defs"].values():
            for name, value in section.get("properties", {}).items():
                assert value.get("description"), name
