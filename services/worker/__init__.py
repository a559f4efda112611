"""What prefill and decode workers share: an engine beside a KV data plane, an index publisher and an announcement. A library."""
