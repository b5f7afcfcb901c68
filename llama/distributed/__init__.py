"""Ranks that work together: the job, its process groups, devices and dtypes, and linears split over ranks."""
