"""The commands of `lightning-optim`: one file for each, and how they read a user's config."""
