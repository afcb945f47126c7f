"""Storage of scans, results, models and caches: locations, atomic writing, checks."""
