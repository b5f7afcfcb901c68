"""Whether files are what they should be: checksums, names, shapes and values."""
