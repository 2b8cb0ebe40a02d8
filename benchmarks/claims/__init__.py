"""What papers claim, looked at on real data at the size of this machine."""
