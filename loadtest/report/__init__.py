"""What people see of a load test: a terminal's summary, one HTML page that works offline, comparisons, other tools' result files."""
