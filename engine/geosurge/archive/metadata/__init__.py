"""Positions in pictures and their sidecars: read, written, and taken back."""
