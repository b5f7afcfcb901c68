"""The command line: flags, reports and errors."""
