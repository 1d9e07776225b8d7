"""Plans for accelerators that are not present: functions compiled ahead of time for TPU slices."""
