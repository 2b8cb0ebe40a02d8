"""The memory of a training before it runs."""
