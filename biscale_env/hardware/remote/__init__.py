"""Records and commands between machines: keys, authenticated sockets, fresh commands only."""
