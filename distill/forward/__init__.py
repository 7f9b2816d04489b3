"""Hidden states and drawn responses with shared prefixes, for any model family."""
