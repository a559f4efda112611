"""Clients that send one prepared request and note when what came: each file speaks one protocol and nothing else."""
