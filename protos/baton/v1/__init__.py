"""Version 1; stubs are generated and never edited."""
