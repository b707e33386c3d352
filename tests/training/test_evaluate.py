from __future__ import annotations

import numpy as np
import pytest

from geosurge_training.evaluate import summarise


def test_figures_agree_with_a_count_by_hand() -> None:
    errors_km = np.array([25.0, 25.1, 200.0, 751.0, 2500.0, 9000.0])
    radii_km = np.array([30.0, 25.0, 200.0, 700.0, 2600.0, 8000.0])
    figures = summarise("v1", errors_km, radii_km, 0.9)
    assert figures.count == 6
    assert figures.within_km == pytest.approx({"25": 1 / 6, "200": 3 / 6, "750": 3 / 6, "2500": 5 / 6})
    assert figures.median_km == pytest.approx((200.0 + 751.0) / 2)
    assert figures.mean_km == pytest.approx(errors_km.sum() / 6)
    assert figures.radius_coverage == pytest.approx(3 / 6)
    assert figures.to_dict()["index_version"] == "v1"
