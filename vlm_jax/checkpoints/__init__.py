"""Models on disk: Hugging Face folders both ways, Orbax folders, fingerprints."""
