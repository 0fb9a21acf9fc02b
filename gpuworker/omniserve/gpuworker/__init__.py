"""The GPU worker: a gRPC front process and an engine process that loops over stages."""
