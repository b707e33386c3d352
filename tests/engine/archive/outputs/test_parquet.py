from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.rows import any_rows, many

from geosurge.archive.outputs import Format, read_rows, write_outputs
from geosurge.archive.rows import Row
from geosurge.errors import UsageError


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(any_rows, max_size=4))
def test_rows_come_back_from_parquet_as_they_went(tmp_path: Path, some: list[Row]) -> None:
    (path,) = write_outputs(some, tmp_path, [Format.PARQUET])
    assert list(read_rows(path)) == some


def test_many_rows_keep_their_order_in_row_groups_of_bounded_size(tmp_path: Path) -> None:
    (path,) = write_outputs(many(9000), tmp_path, [Format.PARQUET])
    assert list(read_rows(path)) == list(many(9000))
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [4096, 4096, 808]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*missing\.parquet"):
        list(read_rows(tmp_path / "missing.parquet"))
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"cannot read .*damaged\.parquet"):
        list(read_rows(tmp_path / "damaged.parquet"))
    pq.write_table(pa.table({"path": ["a.jpg"]}), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match=r"other\.parquet does not have the columns"):
        list(read_rows(tmp_path / "other.parquet"))
