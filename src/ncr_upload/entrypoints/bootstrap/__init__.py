"""Builds the programs from the settings: the only place that chooses adapters.

One module per program, so that none loads the libraries of another.
"""
