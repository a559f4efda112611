"""The decode worker: owns requests, takes room for them, has their prompts computed elsewhere or here, and decodes in one batch."""
