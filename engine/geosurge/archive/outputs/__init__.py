"""The rows of a run as files: Parquet, CSV, GeoJSON and KML. The page beside this file publishes their schema."""

from geosurge.archive.outputs.parquet import read_rows
from geosurge.archive.outputs.schema import SCHEMA, columns_table
from geosurge.archive.outputs.writing import write_outputs
from geosurge.archive.rows import Format

__all__ = ["SCHEMA", "Format", "columns_table", "read_rows", "write_outputs"]
