"""Helpers of callbacks that know training: schedules, warm-ups, batch sizes, batch norm, GradInit."""
