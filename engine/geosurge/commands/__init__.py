"""The command line: ``geosurge`` with its commands, their options, and what they show."""
