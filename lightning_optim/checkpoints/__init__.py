"""Checkpoint files: whole or not there, and gathered into one."""
