"""The attention server: a native hot loop under a thin gRPC shell."""
