"""Small benchmarks: one machine, one process or two, a reference in the same run."""
