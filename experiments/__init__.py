"""Section 5 in one command each: the tables on the built-in domains, the measurements in two dimensions."""
