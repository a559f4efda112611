"""Model definitions, assembled from a checkpoint's config.json."""
