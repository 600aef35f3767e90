"""What the paper compares TAN with, and FreezeD, which it cites."""
