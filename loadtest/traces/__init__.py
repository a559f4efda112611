"""Workloads of others as schedules, and schedules as Mooncake's format: each file here knows one format and nothing else."""
