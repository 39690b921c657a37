"""The kinds of column groups, one module for each; `table` lists them."""
