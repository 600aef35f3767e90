"""Networks in files: read, recognised, converted, exported.  `python -m checkpoints FILE` says what a file is."""
