"""Models on disk: loads and saves Hugging Face and Orbax folders, and computes fingerprints."""
