"""Partitions of the Earth into nested levels of disjoint cells: of S2, of H3, or of administrative entities.

`interface` says what all of them share, `make` makes the one that a recipe asks for, `load` reads any of them.
"""
