"""How hidden states become rows of bytes, and how NumPy reads them."""
