"""Plans for accelerators that are not there: programs compiled ahead of time for TPU slices."""
