"""Before the first step: whether the run can start, whether all ranks run the same thing, where the time goes."""
