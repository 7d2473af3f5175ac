"""One result for each image at one cut, on a `joblib.Memory`: store, claims, reads and writes."""
