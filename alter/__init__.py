"""ALTER: one small language model, good at all the tasks of a domain."""

__version__ = "0.1.0"
