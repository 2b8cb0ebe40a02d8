"""What callbacks know about training: schedules, warm-ups, batch sizes, batch norm, GradInit."""
