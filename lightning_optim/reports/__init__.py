"""Reports on the memory of optimizers and on GradInit, as values for programs and tables for people."""
