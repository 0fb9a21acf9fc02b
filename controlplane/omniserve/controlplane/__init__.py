"""The control plane: public API, tokenising, admission, SLO state, limits and durable BE jobs."""
