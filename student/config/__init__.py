"""The flags of `from-cache`, recipes and files of flags, checked before anything is loaded."""
