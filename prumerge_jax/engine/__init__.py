"""The batch engine: requests through few jitted functions of fixed shape."""
