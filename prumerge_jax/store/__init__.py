"""Model directories on disk: manifest, integrity, atomic writes, strict JSON."""
