"""Run the lines of a file: each becomes a request, and a line of results; what is finished survives any end."""
