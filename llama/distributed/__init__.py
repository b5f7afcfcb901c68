"""Ranks that work together: the job, process groups, devices and dtypes, and layers split over ranks."""
