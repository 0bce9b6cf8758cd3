"""grokmoe: what all roles share, and the client SDK."""
