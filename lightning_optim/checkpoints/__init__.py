"""Checkpoint files: written atomically, verified, and consolidated from shards into one file."""
