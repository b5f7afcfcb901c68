"""What a run needs of each rank's memory, what is free, and the plan made of both."""
