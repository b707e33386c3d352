"""GeoSURGE engine: a geocell search engine. An image goes in; a place on Earth comes out."""

__version__ = "0.1.0"
