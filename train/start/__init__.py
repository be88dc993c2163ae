"""Before any device is touched: what refuses a run, and whether all ranks run the same thing."""
