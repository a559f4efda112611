"""The KV index service: which worker holds which prefix, for routers that keep a replica and for callers that keep none."""
