from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from geosurge.errors import ConfigurationError
from geosurge_training.fitting.schedule import EarlyStopping, Schedule
from geosurge_training.recipe import TrainingSection


def schedule(train_count: int | None = None, **fields: Any) -> Schedule:
    return Schedule.of(TrainingSection(**{"learning_rate": 2.0, "batch_size": 8, **fields}), train_count)


def test_the_rate_warms_up_in_a_line_and_falls_in_half_a_cosine_to_zero() -> None:
    plan = schedule(steps=24, warmup_steps=4)
    rates = [plan.rate(step) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[14] == pytest.approx(1.0)
    assert rates[24] == pytest.approx(0.0, abs=1e-12)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert schedule(steps=1).rate(0) == 2.0


def test_halving_halves_the_rate_with_each_epoch_whose_images_have_all_been_seen() -> None:
    # 20 images, 8 a step: epochs end after 2.5, 5 and 7.5 steps.
    plan = schedule(20, epochs=3, schedule="halving")
    assert plan.steps == 8
    assert [plan.rate(step) for step in range(8)] == [2.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    assert [step for step in range(8) if plan.ends_epoch(step)] == [2, 4, 7]


def test_halving_warms_up_too() -> None:
    plan = schedule(80, steps=30, schedule="halving", warmup_steps=4)
    assert [plan.rate(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert [plan.rate(step) for step in (9, 10, 20)] == [2.0, 1.0, 0.5]


@pytest.mark.parametrize(("train_count", "steps"), [(16, 6), (17, 7), (3, 2)])
def test_epochs_are_as_many_steps_as_it_takes_to_see_all_their_images(train_count: int, steps: int) -> None:
    plan = schedule(train_count, epochs=3)
    assert plan.steps == steps
    assert plan.epochs_before(steps) >= 3 > plan.epochs_before(steps - 1)
    assert plan.ends_epoch(steps - 1)


@pytest.mark.parametrize(
    "fields",
    [{"epochs": 2}, {"steps": 9, "schedule": "halving"}, {"steps": 9, "patience": 4}],
    ids="-".join,
)
def test_a_source_whose_images_never_repeat_has_no_epochs(fields: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigurationError, match=f"training.{list(fields)[-1]}.* its images never repeat; give training"
    ):
        schedule(**fields)
    assert not any(schedule(steps=9).ends_epoch(step) for step in range(9))


def test_patience_ends_a_run_after_epochs_without_gain_in_a_row() -> None:
    stopping = EarlyStopping(2)
    ends = []
    for loss in (5.0, 4.0, 4.5, 3.9, 3.9, 4.0):
        stopping = stopping.after(loss)
        ends.append(stopping.ends)
    assert ends == [False] * 5 + [True]
    assert stopping == EarlyStopping(2, 3.9, 2)
    # The state of a checkpoint is all that is needed to go on.
    assert EarlyStopping(2, **stopping.state()) == stopping


def test_without_patience_nothing_ends_and_nothing_is_kept() -> None:
    stopping = replace(EarlyStopping(None), epochs_without_gain=1000)
    assert not stopping.ends
    assert stopping.state() == {}
