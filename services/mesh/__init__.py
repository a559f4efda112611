"""What every process of the mesh shares: settings, servers, clients, errors on the wire, discovery, the KV data plane. Never torch."""
