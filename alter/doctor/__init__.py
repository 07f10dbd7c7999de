"""``alter doctor``: looks at a recipe's data, backbone and machine before a run."""
