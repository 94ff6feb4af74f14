"""Use cases, written on ports only."""
