"""Words that every part of Baton shares; standard library only."""
