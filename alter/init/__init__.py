"""``alter init``: tasks and a recipe proposed from labelled files."""
