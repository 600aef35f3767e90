"""Networks in files: read, recognised, converted, exported.  `python -m checkpoints FILE`: what a file is."""
