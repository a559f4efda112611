"""Text to token ids and back, streamed without half characters, and chat messages to a prompt."""
