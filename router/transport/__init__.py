"""How the router reaches its workers: an interface (base) and its implementations (local, grpc)."""
