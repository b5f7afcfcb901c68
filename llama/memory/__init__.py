"""The memory that a run needs on each rank, the memory that is free, and the plan that compares them."""
