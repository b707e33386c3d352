"""Generated protobuf and gRPC code of the public API; `make proto` regenerates it from proto/."""
