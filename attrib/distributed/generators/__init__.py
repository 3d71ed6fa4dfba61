"""The generator jobs on Ray: synthesize, fingerprint, identify, evaluate."""
