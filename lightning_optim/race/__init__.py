"""Races between optimizers: runs, a folder that keeps them, statistics, a table, a picture and a page."""
