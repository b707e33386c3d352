"""What is varied, and what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from geosurge.errors import ConfigurationError
from geosurge_training.recipe import AdaptivePartitionSection, Recipe

Changes = Mapping[str, Any]
"""Values of a recipe by dotted key."""

BuiltBy = Literal["training", "plain means", "shrunken means"]

BASE: Final = "base"
"""The variant that nothing is changed of."""

PLAIN_MEANS: Final = "plain-means"

PROTOTYPE_VIEWS: Final = 10_000
"""Views that an index without training is made from."""

_LEVELS_KEPT: Final = {1: (6,), 3: (0, 3, 6), 5: (0, 1, 3, 5, 6)}
"""Of seven levels, those that a smaller number keeps: the leaves are the same."""


@dataclass(frozen=True)
class Variant:
    """The recipe with something changed.

    Attributes:
        name: Of its folder and its rows.
        label: What it is, for people; of the unchanged recipe that depends on the question.
        changes: What is changed.
        built_by: What makes the cells' embeddings: training, or means of views that the encoder of the unchanged recipe
            embeds, which stand alone or lean on their parents.
    """

    name: str
    label: str
    changes: Changes
    built_by: BuiltBy = "training"


@dataclass(frozen=True)
class Expectation:
    """What the paper (GeoSURGE, arXiv 2510.01448) found of two variants: that the first is better.

    Attributes:
        better: Name of a variant.
        worse: Name of another.
        finding: What the paper says, with its figures.
    """

    better: str
    worse: str
    finding: str


@dataclass(frozen=True)
class Question:
    """Variants that answer one question.

    Attributes:
        title: The question.
        base: What the variant that the others are compared with is in this respect.
        variants: Names of the others.
        remark: What to know when reading the answer.
        expectations: What the paper found; none for questions that it leaves open.
        compared_with: Name of the variant that the others are compared with.
    """

    title: str
    base: str
    variants: tuple[str, ...]
    remark: str
    expectations: tuple[Expectation, ...] = ()
    compared_with: str = BASE


def variants(recipe: Recipe) -> tuple[Variant, ...]:
    """All variants of a recipe.

    Args:
        recipe: With seven levels of S2 cells, fusion blocks, learned embeddings and all cells as negatives.

    Raises:
        ConfigurationError: It is another kind of recipe.
    """
    partition = recipe.partition
    expected = {
        "partition.kind": (partition.kind, "s2"),
        "partition levels": (partition.level_count, 7),
        "encoder.fusion.blocks": (recipe.encoder.fusion.blocks, 3),
        "training.head": (recipe.training.head, "embeddings"),
        "training.negatives": (recipe.training.negatives, "all_cells"),
    }
    wrong = [f"{name} is {found!r}, not {wanted!r}" for name, (found, wanted) in expected.items() if found != wanted]
    if wrong or not isinstance(partition, AdaptivePartitionSection):
        raise ConfigurationError(f"recipe {recipe.name} cannot be varied: {'; '.join(wrong)}")
    tau_max, tau_min = partition.tau_max, partition.tau_min_per_level
    return (
        Variant(BASE, "", {}),
        *(
            Variant(
                f"levels-{count}",
                f"{count} level{'s' if count > 1 else ''}",
                {
                    "partition.tau_max": [tau_max[level] for level in kept],
                    "partition.tau_min": [tau_min[level] for level in kept],
                },
            )
            for count, kept in reversed(_LEVELS_KEPT.items())
        ),
        Variant("blocks-2", "2 fusion blocks", {"encoder.fusion.blocks": 2}),
        Variant("blocks-1", "1 fusion block", {"encoder.fusion.blocks": 1}),
        Variant("blocks-0", "no fusion", {"encoder.fusion.blocks": 0}),
        Variant("vision-skip", "3 fusion blocks and a skip around them", {"encoder.fusion.vision_skip": True}),
        Variant("classifier", "plain classification", {"training.head": "classifier"}),
        Variant("h3", "H3 cells", {"partition": {"kind": "h3", "tau_min": tau_min, "tau_max": tau_max}}),
        Variant(
            "administrative",
            "country, region, subregion, city",
            {"partition": {"kind": "administrative", "tau_min": tau_min[-1]}},
        ),
        Variant("batch-negatives", "cells of the batch", {"training.negatives": "batch"}),
        Variant(PLAIN_MEANS, "", {}, built_by="plain means"),
        Variant("shrunken-means", "shrunken means", {}, built_by="shrunken means"),
    )


QUESTIONS: Final = (
    Question(
        "How many levels?",
        "7 levels",
        ("levels-5", "levels-3", "levels-1"),
        "The leaves are the same; fewer levels leave out coarser ones.",
        (
            Expectation(BASE, "levels-5", "seven levels are better than five (17.8 and 11.1 % within 1 km, YFCC26k)"),
            Expectation(
                "levels-5", "levels-1", "five levels are better than one (11.1 and 8.9 % within 1 km, YFCC26k)"
            ),
        ),
    ),
    Question(
        "How many fusion blocks?",
        "3 fusion blocks",
        ("blocks-2", "blocks-1", "blocks-0", "vision-skip"),
        "Without fusion, the embedding comes from the vision tower alone; the skip adds that embedding to the fused "
        "one (`vision_skip`; not in the paper).",
        (
            Expectation(
                BASE, "blocks-0", "three blocks are better than no fusion (17.8 and 13.8 % within 1 km, YFCC26k)"
            ),
        ),
    ),
    Question(
        "Learned embeddings or plain classification?",
        "learned embeddings",
        ("classifier",),
        "Plain classification has free weights for each cell: no cosine, and no temperature that learns.",
        (Expectation(BASE, "classifier", "learned embeddings are better than hierarchical classification"),),
    ),
    Question(
        "Which cells?",
        "S2 cells",
        ("h3", "administrative"),
        "The same coordinates and thresholds; H3 cells have seven children where S2 cells have four, and "
        "administrative entities have four levels and no upper threshold. The paper leaves this open.",
    ),
    Question(
        "Which negatives?",
        "all cells",
        ("batch-negatives",),
        "All cells of a level, or the distinct cells of the batch. The paper trains with those of a batch of 1,024 and "
        "reports no comparison.",
    ),
    Question(
        "Shrinkage of sparse cells?",
        "plain means",
        ("shrunken-means",),
        f"Indexes of {PROTOTYPE_VIEWS:,} views, made without training with the trained encoder; a cell's mean stands "
        "alone, or leans on its parent's. How to steady sparse cells is the paper's open question; "
        "`tests/benchmarks/sparse_cells.py` tells cells apart by their number of samples.",
        compared_with=PLAIN_MEANS,
    ),
)
"""What the study asks."""


def apply(recipe: Recipe, variant: Variant, seed: int) -> Recipe:
    """The recipe of a variant.

    Args:
        recipe: What is varied.
        variant: How.
        seed: Seed of data, weights and order.
    """
    fields = recipe.model_dump(exclude_unset=True)
    for key, value in variant.changes.items():
        *sections, last = key.split(".")
        section = fields
        for name in sections:
            section = section[name]
        section[last] = value
    return Recipe.model_validate({**fields, "name": f"{recipe.name}-{variant.name}", "seed": recipe.seed + seed})
