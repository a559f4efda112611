"""The router's HTTP face, in OpenAI's words."""
