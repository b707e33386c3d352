"""A run on one page: how many, how sure, where, and what failed and why."""

from geosurge.archive.report.page import RunSummary, write_report

__all__ = ["RunSummary", "write_report"]
