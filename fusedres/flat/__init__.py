"""Conversion on one flat graph: the engine that is to replace :mod:`fusedres.fusion`."""
