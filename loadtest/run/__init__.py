"""`loadtest run`: sends a schedule to a mesh or another server, whether or not it keeps up, and says what each request got."""
