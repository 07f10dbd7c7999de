"""A finished run as a server: `alter serve`."""
