"""Bulk geotagging: a whole archive in, one row for each picture out."""
