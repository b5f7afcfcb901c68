"""Models by name: from the hub or its cache on this disk, and the demo model; knows nothing of what is in the files."""
