"""Programs: the API, the worker, beat, the command line and the embedded stack."""
