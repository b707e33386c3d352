"""The variants of the study: each changes what it says and nothing else."""

from __future__ import annotations

import pytest

from geosurge.errors import ConfigurationError
from geosurge_training.ablations.command import DEFAULT_RECIPE
from geosurge_training.ablations.study import QUESTIONS, apply, variants
from geosurge_training.recipe import Recipe, load_recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(DEFAULT_RECIPE)


def test_every_variant_is_a_recipe_that_differs_in_its_own_respect_alone(recipe: Recipe) -> None:
    base = apply(recipe, variants(recipe)[0], 3).model_dump()
    differing = {}
    for variant in variants(recipe)[1:]:
        if variant.built_by != "training":
            continue
        varied = apply(recipe, variant, 3).model_dump()
        assert varied["seed"] == base["seed"] == recipe.seed + 3
        differing[variant.name] = {key for key in base if key != "name" and base[key] != varied[key]}
    sections = {
        "partition": ("levels-5", "levels-3", "levels-1", "h3", "administrative"),
        "encoder": ("blocks-2", "blocks-1", "blocks-0", "vision-skip"),
        "training": ("classifier", "batch-negatives"),
    }
    assert differing == {name: {section} for section, names in sections.items() for name in names}


def test_fewer_levels_keep_the_leaves(recipe: Recipe) -> None:
    by_name = {variant.name: apply(recipe, variant, 0).partition for variant in variants(recipe)}
    assert [by_name[f"levels-{count}"].level_count for count in (1, 3, 5)] == [1, 3, 5]
    for name in ("levels-1", "levels-3", "levels-5", "h3"):
        assert by_name[name].model_dump()["tau_max"][-1] == recipe.partition.model_dump()["tau_max"][-1]


def test_every_question_is_about_variants_that_there_are(recipe: Recipe) -> None:
    names = {variant.name for variant in variants(recipe)}
    asked = {question: {question.compared_with, *question.variants} for question in QUESTIONS}
    assert set().union(*asked.values()) == names
    for question in QUESTIONS:
        for expectation in question.expectations:
            assert {expectation.better, expectation.worse} <= asked[question]


def test_a_recipe_without_what_is_varied_is_refused(recipe: Recipe) -> None:
    single = recipe.model_copy(update={"training": recipe.training.model_copy(update={"negatives": "batch"})})
    with pytest.raises(ConfigurationError, match=r"training\.negatives is 'batch', not 'all_cells'"):
        variants(single)
