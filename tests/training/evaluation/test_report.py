from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from geosurge.errors import OutputNotWritableError
from geosurge_training.evaluation.bootstrap import Bootstrap
from geosurge_training.evaluation.datasets import BENCHMARKS
from geosurge_training.evaluation.evaluate import Evaluation, EvaluationOptions
from geosurge_training.evaluation.metrics import LeafOutcomes, Outcomes, summarise
from geosurge_training.evaluation.report import print_tables, to_markdown, write_report


def make_evaluation(benchmark: str | None = None, *, with_leaves: bool = True) -> Evaluation:
    rng = np.random.default_rng(3)
    errors = rng.exponential(300.0, 80)
    leaves = LeafOutcomes(rng.uniform(size=80), errors < 100.0, np.where(errors < 900.0, errors**2, np.inf))
    outcomes = Outcomes(
        errors, np.full(80, 500.0), 0.9, rng.uniform(size=(80, 4)) < 0.5, leaves if with_leaves else None
    )
    bootstrap = Bootstrap(50)
    return Evaluation(
        index_version="v1",
        material="a|b",
        benchmark=None if benchmark is None else BENCHMARKS[benchmark],
        options=EvaluationOptions(bootstrap=bootstrap),
        point_estimator="leaf",
        figures=summarise(outcomes, bootstrap),
        outcomes=outcomes,
        failures={"IMAGE_TRUNCATED": 3},
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_page_tells_each_figure_with_its_interval() -> None:
    evaluation = make_evaluation()
    page = to_markdown(evaluation).splitlines()
    assert page[0] == "# v1 on 80 images: a\\|b"
    rows = {name: values for name, *values in (cells(line) for line in page if line.startswith("|"))}
    low, high = evaluation.figures.within_km[200].interval
    assert rows["within 200 km"] == [f"{evaluation.figures.within_km[200].value:.1%}", f"{low:.1%} to {high:.1%}"]
    assert rows["GeoScore"][0] == f"{evaluation.figures.geoscore.value:.0f}"
    assert rows["not located: IMAGE_TRUNCATED"][0] == "3"
    assert "Published" not in "".join(page)


def test_published_results_stand_beside_the_runs_own_in_columns_that_somebody_has_published() -> None:
    evaluation = make_evaluation("osv5m")
    page = to_markdown(evaluation)
    table = page.split("## Published on OpenStreetView-5M")[1].splitlines()
    header, _, own, hierloc, *_ = [cells(line) for line in table if line.startswith("|")]
    assert header == ["", "GeoScore", "mean, km", "country, %", "region, %", "subregion, %", "city, %", "source"]
    assert own[0] == "v1"
    assert own[-1] == "this run, 80 of 83"  # published figures are of all images
    assert own[1] == f"{evaluation.figures.geoscore.value:.1f}"
    assert hierloc[:7] == ["HierLoc", "3963.0", "861.0", "82.9", "55.0", "40.7", "23.3"]
    assert "2601.23064" in hierloc[7]


def test_published_places_stand_beside_others_with_a_word_on_whose_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "GeoNames cities nearest" in to_markdown(make_evaluation("osv5m"))
    assert "GeoNames" not in to_markdown(make_evaluation("im2gps3k"))
    print_tables(make_evaluation("osv5m"), Console(width=400))
    assert "GeoNames cities nearest" in capsys.readouterr().out


def test_a_run_that_located_every_image_stands_beside_published_results_as_it_is() -> None:
    page = to_markdown(replace(make_evaluation("im2gps3k"), failures={}))
    assert "| this run |" in page


def test_plots_show_something_each_and_only_what_was_measured(tmp_path: Path) -> None:
    paths = write_report(make_evaluation(), tmp_path / "new" / "folder")
    names = [path.name for path in paths]
    assert names == ["evaluation.json", "evaluation.md", "error-cdf.png", "recall-vs-area.png", "reliability.png"]
    seen = set()
    for path in paths[2:]:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        seen.add(pixels.tobytes())
        assert f"({path.name})" in paths[1].read_text()
    assert len(seen) == 3
    bare = write_report(make_evaluation(with_leaves=False), tmp_path / "bare")
    assert [path.name for path in bare[2:]] == ["error-cdf.png"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputNotWritableError, match="--output"):
        write_report(make_evaluation(), tmp_path / "file" / "out")
