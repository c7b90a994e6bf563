"""The server of a packed model: admission, micro-batches, one inference thread, audit, drain."""
