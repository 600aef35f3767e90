"""What the paper compares TAN with."""
