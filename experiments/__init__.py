"""Section 5 in one command each: the tables and figures on the built-in domains, and the measurements in two dimensions."""
