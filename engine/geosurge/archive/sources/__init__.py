"""What is there to be geotagged: folders, lists of paths and tar shards."""

from geosurge.archive.sources.counts import ScanCounts
from geosurge.archive.sources.found import Found
from geosurge.archive.sources.scan import is_picture, scan

__all__ = ["Found", "ScanCounts", "is_picture", "scan"]
