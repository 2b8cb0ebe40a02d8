"""What state costs in memory, for programs and for people."""
