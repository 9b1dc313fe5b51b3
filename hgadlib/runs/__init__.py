"""One run and many: inputs, the experiment, its directory and record, the ledger and grids of runs."""
