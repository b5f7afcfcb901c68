"""Check whether files are what they should be: checksums, names, shapes and values."""
