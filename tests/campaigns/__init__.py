"""Long campaigns: faults, fuzzing, soaking."""
