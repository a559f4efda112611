"""Process: the front door. Takes requests from clients, chooses the workers for each, follows it to its last token."""
