"""What a page of an optimizer is written in: functions, options, slots, and the program that is read off it."""
