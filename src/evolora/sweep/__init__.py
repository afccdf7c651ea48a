"""Grids of methods, streams, orders and seeds: run, kept, compared."""
