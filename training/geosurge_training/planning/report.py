"""A plan as tables for people, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from geosurge_training.planning.plan import Course, Plan
from geosurge_training.planning.timing import Machine, run_seconds

_GIB = 2**30


def to_dict(plan: Plan, machine: Machine | None) -> dict[str, Any]:
    """The plan as plain data; see `Plan` for the meaning of each field.

    Args:
        plan: The plan.
        machine: What it would run on; without one there are no times.

    Returns:
        What `json` can write; sizes in bytes, times in seconds.
    """

    def course(course: Course | None) -> dict[str, Any] | None:
        if course is None:
            return None
        fields = asdict(course)
        fields["memory"]["total"] = course.memory.total
        if machine is not None:
            fields["seconds"] = run_seconds(course, machine, plan.devices)
            fields["fits"] = course.memory.total <= machine.gpu.memory_gb * 1e9
        return fields

    fields = asdict(plan)
    return {
        **fields,
        "parts": list(fields["parts"].values()),
        "direct": course(plan.direct),
        "cached": course(plan.cached),
        "machine": None if machine is None else asdict(machine),
    }


def print_plan(plan: Plan, machine: Machine | None, console: Console) -> None:
    """Prints the plan.

    Args:
        plan: The plan.
        machine: What it would run on; without one there are no times.
        console: Where to.
    """
    console.print(_parts_table(plan))
    console.print(_part_memory_table(plan))
    console.print(_memory_table(plan))
    console.print(_run_table(plan, machine))
    console.print("\n".join(f"- {note}" for note in _notes(plan, machine)))


def _parts_table(plan: Plan) -> Table:
    table = _table(plan.name, "part", "parameters", "trained", "GFLOP to encode", "GFLOP to train")
    for part in plan.parts:
        table.add_row(
            part.name,
            f"{part.parameters:,}",
            f"{part.trained_parameters:,}",
            f"{part.forward_flops / 1e9:,.3f}",
            f"{part.training_flops / 1e9:,.3f}",
        )
    table.add_section()
    table.add_row(
        "all",
        f"{sum(part.parameters for part in plan.parts):,}",
        f"{sum(part.trained_parameters for part in plan.parts):,}",
        f"{sum(part.forward_flops for part in plan.parts) / 1e9:,.3f}",
        f"{sum(part.training_flops for part in plan.parts) / 1e9:,.3f}",
    )
    return table


def _part_memory_table(plan: Plan) -> Table:
    table = _table("memory of each device by part, GiB", "part", "weights", "gradients", "AdamW", "activations")
    for part in plan.parts:
        memory = part.memory
        table.add_row(part.name, *map(_gib, (memory.weights, memory.gradients, memory.moments, memory.activations)))
    whole = plan.direct.memory
    table.add_section()
    at_once = whole.activations + whole.loss
    table.add_row("all, at one time", *map(_gib, (whole.weights, whole.gradients, whole.moments, at_once)))
    return table


def _memory_table(plan: Plan) -> Table:
    courses = _courses(plan)
    table = _table("memory of each device by kind, GiB", "", *courses)
    rows = {
        "weights": "weights, float32",
        "gradients": "gradients",
        "moments": "moments of AdamW",
        "activations": f"activations of {plan.micro_batch_size} images",
        "loss": "loss",
        "inputs": "inputs",
        "total": "all",
    }
    for field, label in rows.items():
        if field == "total":
            table.add_section()
        table.add_row(label, *(_gib(getattr(course.memory, field)) for course in courses.values()))
    return table


def _run_table(plan: Plan, machine: Machine | None) -> Table:
    courses = _courses(plan)
    table = _table("the run", "", *courses)

    def row(label: str, values: list[str]) -> None:
        table.add_row(label, *values)

    row("steps", [f"{plan.steps:,}" for _ in courses])
    row("images shown", [f"{plan.steps * plan.batch_size:,}" for _ in courses])
    if plan.epochs is not None:
        row("epochs, at most", [f"{plan.epochs:.1f}" for _ in courses])
    row("operations, 10^18", [f"{course.flops / 1e18:,.4g}" for course in courses.values()])
    if plan.cached is not None:
        row("cache on disk, GB", [f"{course.disk_bytes / 1e9:,.0f}" for course in courses.values()])
        row("read from it later, GB", [f"{course.read_bytes / 1e9:,.0f}" for course in courses.values()])
    if machine is not None:
        seconds = [run_seconds(course, machine, plan.devices) for course in courses.values()]
        row("time, at most", [_duration(value) for value in seconds])
        if plan.epochs is not None:
            row("mean time of an epoch", [_duration(value / plan.epochs) for value in seconds])
        available = machine.gpu.memory_gb * 1e9
        row("fits", ["yes" if course.memory.total <= available else "NO" for course in courses.values()])
    return table


def _notes(plan: Plan, machine: Machine | None) -> list[str]:
    notes = [*plan.extent.origins]
    notes.append(
        f"{plan.batch_size} images a step on {plan.devices} device{'s' * (plan.devices > 1)}, "
        f"{plan.micro_batch_size} at once, in {plan.precision}"
    )
    notes.append(
        "operations are those of matrix products, convolutions and attention; activations are the allocations of one "
        "micro-batch, as PyTorch's CPU autocast makes them, without what an allocator adds: of a part those of its own "
        "pass, and of all of them the most that there are at one time"
    )
    if machine is not None:
        gpu = machine.gpu
        notes.append(
            f"{gpu.name}: {gpu.bfloat16_tflops:g} TFLOP/s and {gpu.memory_gb:.4g} GB ({gpu.source}), "
            f"of which {machine.utilisation:.0%} are taken to be reached; reading images and, with several devices, "
            "talking is taken to cost nothing"
        )
        if plan.cached is not None:
            notes.append(f"the cache's disk gives {machine.disk_gb_per_s:g} GB a second, beside the arithmetic")
    if plan.cached is not None:
        asked = "with" if plan.uses_cache else "without"
        notes.append(f"the recipe asks for the run {asked} a tower cache, whose first epoch runs the towers")
    return notes


def _courses(plan: Plan) -> dict[str, Course]:
    if plan.cached is None:
        return {"as it is": plan.direct}
    return {"without cache": plan.direct, "with tower cache": plan.cached}


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 48 * 3600:
        return str(timedelta(seconds=round(seconds)))
    return f"{seconds / 86400:,.1f} days"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1), title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table
