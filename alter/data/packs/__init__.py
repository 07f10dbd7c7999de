"""Tasks built from data that ships inside Python packages."""
