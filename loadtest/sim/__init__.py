"""`loadtest sim`: the router's own code on a virtual clock, before workers that are models."""
