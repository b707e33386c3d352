"""The gRPC server: versions, admission, batching, services, and the lifetime that holds them together."""
